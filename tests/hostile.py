"""Making ONNX files that are broken in random ways."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def N(operator, inputs, output="y", **attributes):
    """A node; names are separated by blanks."""
    node = helper.make_node(operator, inputs.split(), output.split(), f"the_{operator}")
    for name, value in attributes.items():
        if name == "domain":
            node.domain = value
        else:
            node.attribute.append(helper.make_attribute(name, value))
    return node


def model(nodes, constants, output="y", *, channels=2, size=None, opset=17):
    """A model of one input ``x``."""
    shape = ["n", channels, *(size or ("z", "y", "x"))]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def opset_for(nodes):
    """The oldest opset from 12 on that knows what the nodes say."""
    operators = {node.op_type for node in nodes}
    attributes = {a.name for node in nodes for a in node.attribute}
    if "GroupNormalization" in operators:
        return 21
    if "num_outputs" in attributes or any(
        node.op_type == "Pad" and len(node.input) > 3 for node in nodes
    ):
        return 18
    return 13 if operators & {"Squeeze", "Unsqueeze", "Split"} else 12


def varint(number):
    """A number as protobuf writes it."""
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


SPACE = (6, 7, 8)
KINDS = (1, 2, 3, 4, 6, 7, 8)  # of attributes: numbers, texts, tensors, lists
NUMBERS = (0, 1, 2, 3, 4, 5, 8, -1, -2, 7, 1 << 16, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
REALS = (0.0, 1.0, -1.0, 0.5, 2.0, 1e-5, 1e9, float("nan"), float("inf"))
WORDS = (b"", b"SAME_UPPER", b"SAME_LOWER", b"VALID", b"reflect", b"edge", b"constant", b"linear")
WORDS += (b"nearest", b"cubic", b"asymmetric", b"half_pixel", b"align_corners", b"floor", b"CRD")


def handmade():
    """Small models with arithmetic of shapes, and axes that come and go."""
    rng = np.random.default_rng(1)

    def f4(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def ints(*values):
        return np.array(values, np.int64)

    conv = {"w": f4(4, 2, 3, 3, 3), "b": f4(4)}
    yield model(
        [
            N("Conv", "x w b", "c", pads=[1] * 6),
            N("Shape", "c", "s"),
            N("Reshape", "c split", "r"),
            N("InstanceNormalization", "r one zero", "i"),
            N("Reshape", "i s", "n"),
            N("Relu", "n"),
        ],
        conv | {"split": ints(0, 2, -1), "one": np.ones(2, "f4"), "zero": np.zeros(2, "f4")},
        size=SPACE,
    )
    yield model(
        [
            N("Conv", "x w", "c", pads=[1] * 6),
            N("MaxPool", "c", "p", kernel_shape=[2] * 3, strides=[2] * 3),
            N("Shape", "c", "s"),
            N("Slice", "s two five", "space"),
            N("Shape", "p", "ps"),
            N("Slice", "ps zero two", "lead"),
            N("Concat", "lead space", "sizes", axis=0),
            helper.make_node("Resize", ["p", "", "", "sizes"], ["u"], mode="linear"),
            N("Concat", "u c", "k", axis=1),
            N("Softmax", "k", axis=1),
        ],
        conv | {"zero": ints(0), "two": ints(2), "five": ints(5)},
        size=(6, 8, 10),
    )
    yield model(
        [
            N("Transpose", "x", "t", perm=[0, 2, 3, 4, 1]),
            N("LayerNormalization", "t g", "l", axis=-1),
            N("MatMul", "l m", "mm"),
            N("Gelu", "mm", "ge"),
            N("Transpose", "ge", "back", perm=[0, 4, 1, 2, 3]),
            N("Slice", "back a e ax", "cut"),
            N("Pad", "cut p", mode="reflect"),
        ],
        {
            "g": f4(2),
            "m": f4(2, 4),
            "a": ints(1, 0),
            "e": ints(-1, 4),
            "ax": ints(2, -1),
            "p": ints(0, 0, 1, 0, 2, 0, 0, 0, 1, 1),
        },
        size=SPACE,
        opset=20,
    )
    yield model(
        [
            N("Conv", "x w", "c"),
            N("Reshape", "c split", "s"),
            N("Transpose", "s", "t", perm=[0, 1, 4, 2, 5, 3]),
            N("Reshape", "t joined", "j"),
            N("GlobalAveragePool", "j", "g"),
            N("Mul", "j g", "m"),
            N("Split", "m", "l r", axis=1),
            N("Max", "l r", "k"),
            N("ReduceMean", "k ax", "mean"),
            N("Sub", "k mean"),
        ],
        {
            "w": f4(8, 2, 1, 1),
            "split": ints(1, 2, 2, 2, 6, 8),
            "joined": ints(1, 2, 12, 16),
            "ax": ints(1),
        },
        size=(6, 8),
        opset=18,
    )
    yield model(
        [
            N("Cast", "h", "w", to=1),
            N("ConstantOfShape", "n", "ones", value=numpy_helper.from_array(np.ones(1, "f4"))),
            N("Mul", "ones half", "shift"),
            N("ConvTranspose", "x w shift", "u", strides=[2, 2, 2]),
            N("AveragePool", "u", "a", kernel_shape=[2] * 3, strides=[2] * 3, pads=[1] * 6),
            N("Clip", "a lo hi", "cl"),
            N("Gather", "cl i", "g", axis=1),
            N("Tile", "g t", "ti"),
            N("Where", "mask ti two", "wh"),
            N("ArgMax", "wh", axis=1),
        ],
        {
            "h": f4(2, 3, 2, 2, 2).astype(np.float16),
            "n": ints(3),
            "half": np.float32(0.5),
            "lo": np.float32(-1),
            "hi": np.float32(1),
            "i": ints(0, 2, -1, 1),
            "t": ints(1, 2, 1, 1, 1),
            "mask": np.array([[[[True]]]]),
            "two": np.float32(2),
        },
        size=SPACE,
    )


def with_bytes_changed(random, data):
    """Bytes flipped, taken out, put in or repeated."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        place = random.randrange(len(data) + 1)
        stretch = random.choice((1, 1, 2, 8, 100))
        match random.randrange(5):
            case 0:
                data[place : place + 1] = bytes([random.randrange(256)])
            case 1:
                del data[place : place + stretch]
            case 2:
                data[place:place] = bytes(random.randrange(256) for _ in range(stretch))
            case 3:
                data[place:place] = data[place : place + stretch]
            case _:
                data[place : place + 1] = bytes([1 << random.randrange(8)])
    return bytes(data)


def _tensor(random):
    """A constant of some shape and type."""
    kind = random.choice(("f4", "f4", "i8", "i8", "i8", "f2", "f8", "i4", "?"))
    shape = [random.choice((1, 1, 2, 3, 5, 0)) for _ in range(random.choice((0, 1, 1, 1, 2, 5)))]
    values = [random.choice((0, 1, 2, -1, 3, 1 << 20)) for _ in range(int(np.prod(shape)))]
    return numpy_helper.from_array(np.array(values, kind).reshape(shape))


def _attribute(random, name):
    count = random.choice((1, 2, 3, 3, 3, 6, 6))
    value = random.choice(
        (
            lambda: random.choice(NUMBERS),
            lambda: [random.choice(NUMBERS[:6]) for _ in range(count)],
            lambda: [random.choice(NUMBERS) for _ in range(count)],
            lambda: random.choice(REALS),
            lambda: [random.choice(REALS) for _ in range(count)],
            lambda: random.choice(WORDS),
            lambda: _tensor(random),
        )
    )()
    return helper.make_attribute(name, value)


NAMES = (
    *("axis", "axes", "perm", "pads", "strides", "dilations", "kernel_shape", "group", "mode"),
    *("alpha", "beta", "epsilon", "keepdims", "to", "auto_pad", "ceil_mode", "blocksize"),
    *("count_include_pad", "output_padding", "output_shape", "transB", "num_groups", "value"),
    *("coordinate_transformation_mode", "nearest_mode", "allowzero", "num_outputs", "start"),
)


def with_structure_changed(random, proto, operators):
    """Attributes, inputs, sizes, nodes, initializers or operators changed."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    names = [
        "",
        "x",
        *(o for n in graph.node for o in n.output),
        *(t.name for t in graph.initializer),
    ]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if not graph.node:
            break
        node = random.choice(graph.node)
        match random.randrange(13):
            case 0 | 1:
                known = [a.name for a in node.attribute]
                name = (
                    random.choice(known or NAMES) if random.random() < 0.7 else random.choice(NAMES)
                )
                kept = [a for a in node.attribute if a.name != name]
                del node.attribute[:]
                node.attribute.extend([*kept, _attribute(random, name)])
            case 2 | 3:
                if node.input:
                    node.input[random.randrange(len(node.input))] = random.choice(names)
            case 4:
                if len(node.input) > 1 and random.random() < 0.5:
                    node.input[:] = random.sample(list(node.input), len(node.input))
                else:
                    node.input.append(random.choice(names))
            case 5:
                shape = graph.input[0].type.tensor_type.shape
                dim = random.choice(shape.dim)
                dim.dim_value = random.choice((*range(1, 12), *NUMBERS))
            case 6:
                graph.node.remove(node)
            case 7:
                graph.node.add().CopyFrom(node)
                if random.random() < 0.7:
                    graph.node[-1].output[0] = random.choice(["y", "new"])
                    graph.node[-1].input[:1] = [node.output[0]]
            case 8:
                nodes = list(graph.node)
                random.shuffle(nodes)
                del graph.node[:]
                graph.node.extend(nodes)
            case 9 | 10:
                if graph.initializer:
                    tensor = random.choice(graph.initializer)
                    name = tensor.name
                    if random.random() < 0.5:
                        tensor.CopyFrom(_tensor(random))
                        tensor.name = name
                    elif random.random() < 0.5 and tensor.dims:
                        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(NUMBERS)
                    elif random.random() < 0.5:
                        tensor.data_type = random.randrange(28)
                    else:
                        array = numpy_helper.to_array(tensor).copy()
                        if array.size:
                            array.flat[random.randrange(array.size)] = random.choice(NUMBERS[:9])
                            tensor.CopyFrom(numpy_helper.from_array(array, name))
            case 11:
                node.op_type = random.choice(operators)
            case _:
                made.opset_import[0].version = random.randrange(9, 30)
    return made


class Chain:
    """A random chain of operators with random attributes, mostly such as fit."""

    def __init__(self, random):
        self.random = random
        self.space = random.choice((1, 2, 2, 3, 3, 3))
        self.rank = self.space + 2
        self.opset = random.choice((12, 13, 15, 17, 18, 19, 20, 21, 23))
        self.numbers = np.random.default_rng(random.randrange(1 << 30))
        self.constants = {}
        self.nodes = []
        self.values = ["x"]

    def proto(self):
        """The model."""
        for _ in range(self.random.choice((1, 2, 3, 4, 6))):
            getattr(self, self.random.choice(STEPS))()
        self.node("Identity", [self.values[-1]], "y")
        size = SPACE[-self.space :] if self.random.random() < 0.7 else tuple("zyx"[-self.space :])
        return model(self.nodes, self.constants, size=size, opset=self.opset)

    def node(self, operator, inputs, output=None, **attributes):
        """Add a node; returns its output."""
        name = output or f"v{len(self.nodes)}"
        used = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(operator, inputs, [name], f"n{len(self.nodes)}", **used))
        self.values.append(name)
        return name

    def f4(self, *shape):
        """A constant of real numbers."""
        return self.constant(self.numbers.standard_normal(shape).astype(np.float32))

    def ints(self, *values):
        """A constant of whole numbers."""
        return self.constant(np.array(values, np.int64))

    def constant(self, value):
        """A constant; returns its name."""
        name = f"k{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def value(self):
        """One of the values, mostly the last."""
        return self.values[-1] if self.random.random() < 0.85 else self.random.choice(self.values)

    def each(self, *choices):
        """A number per axis of space."""
        return [self.random.choice(choices) for _ in range(self.space)]

    def maybe(self, value):
        """The value, or nothing."""
        return value if self.random.random() < 0.5 else None

    def axis(self):
        """An axis."""
        return self.random.choice((1, 1, 1, -1, 2, self.rank - 1, -self.rank + 1, 0))

    def axes(self):
        """Some axes."""
        chosen = self.random.sample(range(1, self.rank), self.random.choice((1, 1, self.space)))
        return [a - self.rank if self.random.random() < 0.3 else a for a in chosen]

    def padding(self):
        """Attributes that pad a window."""
        auto = self.random.choice((None, None, None, "SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"))
        pads = self.each(0, 0, 1, 2) + self.each(0, 0, 1)
        return {"auto_pad": auto, "pads": self.maybe(pads) if auto in (None, "NOTSET") else None}

    def conv(self):
        """A convolution; the number of channels is guessed."""
        groups = self.random.choice((1, 1, 1, 2))
        kernel = self.each(1, 2, 3)
        wide = self.random.choice((2, 2, 4, 1, 3))
        weights = self.f4(self.random.choice((2, 4)), max(1, wide // groups), *kernel)
        bias = [self.f4(self.constants[weights].shape[0])] if self.random.random() < 0.5 else []
        self.node(
            "Conv",
            [self.value(), weights, *bias],
            group=self.maybe(groups) if groups == 1 else groups,
            strides=self.maybe(self.each(1, 2)),
            dilations=self.maybe(self.each(1, 1, 2)),
            kernel_shape=self.maybe(kernel),
            **self.padding(),
        )

    def conv_transpose(self):
        """A transposed convolution."""
        stride = self.each(1, 2, 2)
        groups = self.random.choice((1, 1, 2))
        extra = [self.random.randrange(s) for s in stride]
        self.node(
            "ConvTranspose",
            [self.value(), self.f4(2, self.random.choice((1, 2)), *self.each(1, 2, 3))],
            strides=stride,
            group=groups,
            output_padding=extra if self.random.random() < 0.3 else None,
            **self.padding(),
        )

    def pool(self):
        """A pool."""
        average = self.random.random() < 0.5
        more = {"count_include_pad": self.random.choice((None, 0, 1))} if average else {}
        if not average or self.opset >= 19:
            more["dilations"] = self.maybe(self.each(1, 1, 2))
        self.node(
            "AveragePool" if average else "MaxPool",
            [self.value()],
            kernel_shape=self.each(1, 2, 3),
            strides=self.maybe(self.each(1, 2, 3)),
            ceil_mode=self.random.choice((None, 0, 1)),
            **more,
            **self.padding(),
        )

    def pointwise(self):
        """A function of every value."""
        names = "Relu Tanh Sigmoid Neg Abs Floor Ceil Round Sign Erf Softplus Softsign Identity Exp"
        names += " Atan Sin Cos HardSwish Dropout GlobalAveragePool GlobalMaxPool Sqrt Reciprocal"
        operator = self.random.choice(names.split())
        self.node(operator, [self.value()])

    def parametric(self):
        """A function with a parameter."""
        operator = self.random.choice(
            ["Elu", "LeakyRelu", "Selu", "Celu", "HardSigmoid", "ThresholdedRelu", "Clip", "PRelu"]
        )
        alpha = self.random.choice((0.1, 0.5, 1.0, 2.0))
        if operator == "Clip":
            low, high = self.constant(np.float32(-alpha)), self.constant(np.float32(alpha))
            self.node(
                operator, [self.value(), *self.random.choice(([low], ["", high], [low, high]))]
            )
        elif operator == "PRelu":
            shape = self.random.choice(((1,), (2, *(1,) * self.space), (1,) * self.rank, (2,)))
            self.node(operator, [self.value(), self.f4(*shape)])
        else:
            self.node(operator, [self.value()], alpha=self.maybe(alpha))

    def arithmetic(self):
        """Two values, or a value and a constant, in any order."""
        names = "Add Sub Mul Div Pow Min Max Greater Less Equal GreaterOrEqual LessOrEqual"
        operator = self.random.choice(names.split())
        ones = (1,) * self.space
        shapes = ((), (1,), (2, *ones), (1, 2, *ones), (4, *ones), (8,), (1, 1, *ones), (2,))
        other = self.random.choice(self.values)
        if self.random.random() < 0.6:
            other = self.f4(*self.random.choice(shapes))
        inputs = [self.value(), other]
        self.random.shuffle(inputs)
        made = self.node(operator, inputs)
        if operator in ("Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual"):
            if self.random.random() < 0.5:
                made = self.node("Not", [made])
            if self.random.random() < 0.5:
                self.node("Where", [made, self.random.choice(self.values[:-1]), self.f4(1)])
            else:
                self.node("Cast", [made], to=1)

    def several(self):
        """Any number of inputs."""
        operator = self.random.choice(("Sum", "Mean", "Max", "Min", "Concat", "Concat"))
        inputs = [self.value() for _ in range(self.random.choice((1, 2, 2, 3)))]
        self.node(operator, inputs, axis=self.axis() if operator == "Concat" else None)

    def softmax(self):
        """A softmax, or an index."""
        operator = self.random.choice(("Softmax", "Softmax", "LogSoftmax", "ArgMax"))
        made = self.node(operator, [self.value()], axis=self.axis())
        if operator == "ArgMax":
            self.node("Cast", [made], to=1)

    def normalisation(self):
        """A normalisation of some kind."""
        operator = self.random.choice(
            (
                "InstanceNormalization",
                "LayerNormalization",
                "GroupNormalization",
                "LpNormalization",
                "BatchNormalization",
            )
        )
        value, wide = self.value(), self.random.choice((2, 2, 4))
        match operator:
            case "InstanceNormalization":
                self.node(operator, [value, self.f4(wide), self.f4(wide)], epsilon=self.maybe(0.1))
            case "BatchNormalization":
                positive = self.constant(np.abs(self.numbers.standard_normal(wide)).astype("f4"))
                self.node(operator, [value, *(self.f4(wide) for _ in range(3)), positive])
            case "LayerNormalization" if self.opset >= 17:
                axis = self.axis()
                first = axis % self.rank
                shape = [(1, wide, *SPACE[-self.space :])[a] for a in range(first, self.rank)]
                scale = self.random.choice((shape, [1], shape[-1:], [1] * len(shape)))
                self.node(operator, [value, self.f4(*scale)], axis=axis)
            case "GroupNormalization" if self.opset >= 18:
                groups = self.random.choice((1, 2))
                count = wide if self.opset >= 21 else groups
                self.node(operator, [value, self.f4(count), self.f4(count)], num_groups=groups)
            case _:
                self.node(
                    "LpNormalization", [value], axis=self.axis(), p=self.random.choice((1, 2))
                )

    def reduce(self):
        """A reduction."""
        names = "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare"
        operator = self.random.choice(names.split())
        keep = self.random.choice((1, 1, None, 0))
        late = self.opset >= (13 if operator == "ReduceSum" else 18)
        axes = self.maybe(self.axes()) if self.random.random() < 0.3 else self.axes()
        inputs = [self.value(), *([self.ints(*axes)] if late and axes is not None else [])]
        made = self.node(operator, inputs, keepdims=keep, axes=None if late else axes)
        if keep == 0 and axes is not None and self.random.random() < 0.5:
            if self.opset >= 13:
                self.node("Unsqueeze", [made, self.ints(*axes)])
            else:
                self.node("Unsqueeze", [made], axes=axes)

    def move(self):
        """Axes moved, and mostly moved back."""
        order = list(range(self.rank))
        self.random.shuffle(order)
        if self.random.random() < 0.5:
            order = [0, *range(2, self.rank), 1]
        self.node("Transpose", [self.value()], perm=order)
        getattr(
            self, self.random.choice(("pointwise", "arithmetic", "reduce", "matmul", "softmax"))
        )()
        if self.random.random() < 0.7:
            self.node(
                "Transpose", [self.values[-1]], perm=[order.index(i) for i in range(self.rank)]
            )

    def matmul(self):
        """A product with a matrix."""
        wide = self.random.choice((2, 2, 4, 8))
        self.node("MatMul", [self.value(), self.f4(wide, self.random.choice((2, 3)))])

    def reshape(self):
        """Channels split or merged, flattened, blocks moved."""
        value = self.value()
        z = list(SPACE[-self.space :])
        shapes = (
            [0, 2, -1],
            [0, -1],
            [0, 0, -1],
            [1, 1, 2, *z],
            [1, 2, 1, *z],
            [0, 2, 2, *z],
            [0, -1, *z],
            [1, 2, *z[:-1], z[-1] // 2, 2],
            [1, -1, 1, *z],
        )
        made = self.node("Reshape", [value, self.ints(*self.random.choice(shapes))])
        if self.random.random() < 0.6:
            self.random.choice((self.pointwise, self.softmax, self.reduce, self.move))()
            made = self.values[-1]
        if self.random.random() < 0.7:
            self.node("Reshape", [made, self.node("Shape", [value])])

    def blocks(self):
        """Blocks of voxels to channels or back."""
        operator = self.random.choice(("DepthToSpace", "SpaceToDepth"))
        mode = self.random.choice((None, "DCR", "CRD")) if operator == "DepthToSpace" else None
        self.node(operator, [self.value()], blocksize=self.random.choice((1, 2)), mode=mode)

    def pad(self):
        """Padding, also negative."""
        lead = self.random.choice(([0, 0], [0, 0], [0, 0], [0, 1]))
        pads = lead + self.each(0, 1, 2, -1) + lead + self.each(0, 0, 1, 3)
        inputs = [self.value(), self.ints(*pads)]
        mode = self.random.choice((None, "constant", "edge", "reflect"))
        if mode in (None, "constant") and self.random.random() < 0.5:
            inputs.append(self.f4())
        self.node("Pad", inputs, mode=mode)

    def slice(self):
        """A part of some axes."""
        axes = self.axes()
        starts = [self.random.choice((0, 0, 1, 2, -3, -1)) for _ in axes]
        ends = [self.random.choice((9, -1, 5, 1 << 40, -2)) for _ in axes]
        steps = [self.random.choice((1, 1, 1, 2, 3, -1)) for _ in axes]
        more = [self.ints(*steps)] if self.random.random() < 0.5 else []
        self.node("Slice", [self.value(), *(self.ints(*v) for v in (starts, ends, axes)), *more])

    def choose(self):
        """Some channels, repeated or in another order."""
        if self.random.random() < 0.5:
            count = self.random.choice((1, 2, 3))
            indices = [self.random.choice((0, 1, -1, 1, 0, 2)) for _ in range(count)]
            self.node("Gather", [self.value(), self.ints(*indices)], axis=self.axis())
        else:
            self.node(
                "Tile", [self.value(), self.ints(1, self.random.choice((1, 2)), *self.each(1))]
            )

    def resize(self):
        """Another size, by factors or by sizes."""
        by_size = self.random.random() < 0.4
        factors = self.each(1, 2, 2, 3, 0.5)
        scales = self.constant(np.array([1, 1, *factors], np.float32))
        sizes = [int(n * f) for n, f in zip(SPACE[-self.space :], factors, strict=True)]
        inputs = [self.value(), "", scales]
        if by_size:
            inputs = [self.value(), "", "", self.ints(1, self.random.choice((2, 4)), *sizes)]
        places = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        self.node(
            "Resize",
            inputs,
            mode=self.random.choice((None, "nearest", "linear")),
            coordinate_transformation_mode=self.random.choice((None, *places)),
            nearest_mode=self.random.choice((None, "floor", "ceil", "round_prefer_ceil")),
        )

    def expand(self):
        """A mean, as large as what it is of."""
        value = self.value()
        keep = [a for a in range(1, self.rank) if self.random.random() < 0.5] or [1]
        late = self.opset >= 18
        inputs = [value, *([self.ints(*keep)] if late else [])]
        mean = self.node("ReduceMean", inputs, axes=None if late else keep)
        self.node("Expand", [mean, self.node("Shape", [value])])

    def whole_numbers(self):
        """Numbers made whole, reckoned with, and made real again."""
        made = self.node("Round", [self.value()])
        made = self.node("Cast", [made], to=self.random.choice((7, 6, 9, 3)))
        if self.random.random() < 0.6:
            operator = self.random.choice(("Add", "Mul", "Div", "Sub", "Max"))
            kinds = {7: np.int64, 6: np.int32, 9: np.bool_, 3: np.int8}
            kind = kinds[self.nodes[-1].attribute[0].i]
            made = self.node(operator, [made, self.constant(np.array(2, kind))])
        self.node("Cast", [made], to=1)


STEPS = (
    *("conv", "conv", "conv_transpose", "pool", "pool", "pointwise", "parametric", "arithmetic"),
    *(
        "several",
        "softmax",
        "normalisation",
        "reduce",
        "move",
        "matmul",
        "reshape",
        "blocks",
        "pad",
    ),
    *("slice", "choose", "resize", "expand", "whole_numbers", "arithmetic"),
)
