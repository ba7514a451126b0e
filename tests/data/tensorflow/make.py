"""Make the networks of this folder with TensorFlow, and its answers beside them.

The tests read what lies here and need no TensorFlow. To make it anew, with Python 3.11:

    pip install tensorflow-cpu==2.21.0 tf2onnx==1.17.0 onnx==1.23.2
    python tests/data/tensorflow/make.py [NAME ...]

Every network becomes NAME.onnx. NAME.npz holds the ``shape`` (c, z, y, x) of a volume, drawn from
the standard normal distribution by numpy's default generator of seed 0, and TensorFlow's answers
``y0``, ``y1`` … for it, (c, z, y, x) as well; 2D networks answer section by section.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import keras
import numpy as np
import tensorflow as tf
import tf2onnx
from keras import layers as k
from keras import ops

FOLDER = Path(__file__).parent
V3, S3 = (8, 12, 14), (8, 12, 16)  # of volumes, and of files of fixed size
V2, S2 = (20, 24), (20, 32)
SECTIONS = 2  # of the volume that a 2D network answers


@dataclass(frozen=True)
class Entry:
    """One network: ``build`` makes its outputs of its input.

    TensorFlow answers a volume of size ``volume``. The file is exported at ``size``, or with its
    sizes open: by "keras" itself, by "tf2onnx", or by "nchw", which is tf2onnx asked for channels
    first.
    """

    build: Callable[[keras.KerasTensor], object]
    volume: tuple[int, ...]
    size: tuple[int, ...] = ()
    way: str = "keras"
    opset: int = 17
    name: str = ""
    first: bool = False  # whether its layers have channels first

    @property
    def rank(self) -> int:
        """Axes of space."""
        return len(self.volume)

    def model(self, size: tuple[int | None, ...]) -> keras.Model:
        """The network for arrays of ``size``, always with the same weights."""
        seed = crc32(self.name.encode())
        keras.utils.set_random_seed(seed)
        given = keras.Input((1, *size) if self.first else (*size, 1), name="volume")
        model = keras.Model(given, self.build(given))
        # Keras exports what was called before
        model(np.zeros([1, *(n or 32 for n in given.shape[1:])], np.float32))
        random = np.random.default_rng(seed)
        for weight in model.weights:
            weight.assign(_drawn(weight, random))
        return model

    def answers(self) -> dict[str, np.ndarray]:
        """The shape of the volume, and TensorFlow's answers."""
        shape = (1, *((SECTIONS,) if self.rank == 2 else ()), *self.volume)
        volume = np.random.default_rng(0).standard_normal(shape, np.float32)
        batch = np.moveaxis(volume, 0, 1)[:, 0] if self.rank == 2 else volume
        axis = 1 if self.first else -1
        found = self.model(self.volume)(np.expand_dims(batch, axis))
        outputs = found if isinstance(found, list | tuple) else [found]
        answers = {"shape": np.array(shape)}
        for i, output in enumerate(outputs):
            last = output.numpy() if axis == -1 else np.moveaxis(output.numpy(), 1, -1)
            last = last if self.rank == 2 else last[0]
            ones = (1,) * (4 - last.ndim)  # of what was reduced
            answers[f"y{i}"] = np.moveaxis(
                last.reshape(*last.shape[:-1], *ones, last.shape[-1]), -1, 0
            )
        return answers

    def export(self, path: Path) -> None:
        """Write the network as ONNX."""
        model = self.model(self.size or (None,) * self.rank)
        if self.way == "keras":
            model.export(path, format="onnx", opset_version=self.opset, verbose=False)
            return
        given = [tf.TensorSpec((1, *model.inputs[0].shape[1:]), tf.float32, name="volume")]
        first: dict[str, list[str]] = {}
        if self.way == "nchw":
            first = {"inputs_as_nchw": ["volume:0"], "outputs_as_nchw": ["Identity:0"]}
        tf2onnx.convert.from_function(
            tf.function(lambda volume: model(volume), input_signature=given),
            input_signature=given,
            opset=self.opset,
            output_path=str(path),
            **first,
        )


def _drawn(weight: keras.Variable, random: np.random.Generator) -> np.ndarray:
    """Weights of a scale that deep networks keep; normalisations and slopes not the default."""
    name, shape = weight.path.rsplit("/", 1)[-1], weight.shape
    if "variance" in name or name in ("gamma", "scale"):
        return random.uniform(0.5, 1.5, shape)
    if name == "alpha":
        return random.uniform(0.05, 0.6, shape)
    if "kernel" in name:
        return random.standard_normal(shape) * (1.5 / np.prod(shape[:-1])) ** 0.5
    return random.standard_normal(shape) * 0.2


# Blocks


def function(of, shape=None):
    """A function as a layer; its output is as its input unless ``shape`` says otherwise."""
    return k.Lambda(of, output_shape=shape or (lambda given: given))


def conv(channels, kernel=3, rank=3, **options):
    options.setdefault("padding", "same")
    return (k.Conv3D if rank == 3 else k.Conv2D)(channels, kernel, **options)


def block(x, channels, rank=3, activation="relu", norm=True, **options):
    """Convolution, batch normalisation, activation."""
    x = conv(channels, rank=rank, use_bias=not norm, **options)(x)
    x = k.BatchNormalization()(x) if norm else x
    return k.Activation(activation)(x)


def unet(rank, up, pool=None, norm=True, channels=(4, 6), end=2, activation="relu"):
    """A U-Net of one or more poolings: ``up`` and ``pool`` make the layers between its levels."""
    pool = pool or (k.MaxPooling3D if rank == 3 else k.MaxPooling2D)

    def level(x, widths):
        x = block(x, widths[0], rank, activation, norm)
        if len(widths) == 1:
            return x
        deep = level(pool(2)(x), widths[1:])
        x = k.Concatenate()([up(widths[0])(deep), x])
        return block(x, widths[0], rank, activation, norm)

    return lambda x: conv(end, 1, rank, activation="softmax")(level(x, channels))


def squeeze_excite(x, rank):
    pool = k.GlobalAveragePooling3D if rank == 3 else k.GlobalAveragePooling2D
    width = x.shape[-1]
    s = k.Dense(3, activation="relu")(pool()(x))
    s = k.Dense(width, activation="sigmoid")(s)
    s = k.Reshape((1,) * rank + (width,))(s)
    return k.Multiply()([x, s])


def _half(g):
    return (g[0], *(n and n // 2 for n in g[1:3]), g[3] * 4)


def _twice(g):
    return (g[0], *(n and n * 2 for n in g[1:3]), g[3] // 4)


def _wider(g):
    return (g[0], *(n and n + 4 for n in g[1:3]), g[3])


# Networks


def residual(x):
    """Strides with "same" padding, which is not the same on both sides; shortcuts of one voxel."""
    a = block(x, 6, strides=2)
    b = k.Add()([conv(6, 1)(a), block(block(a, 6), 6, activation="linear")])
    c = k.Add()(
        [conv(8, 1, strides=(1, 2, 2))(b), block(b, 8, strides=(1, 2, 2), activation="elu")]
    )
    return conv(2, 1)(k.ReLU()(c))


def residual_2d(x):
    """Padding laid on by a layer of its own before valid convolutions, as ResNet has it."""
    x = k.ZeroPadding2D(3)(x)
    x = k.ReLU()(k.BatchNormalization()(conv(6, 7, 2, strides=2, padding="valid")(x)))
    x = k.MaxPooling2D(3, strides=2)(k.ZeroPadding2D(1)(x))
    y = block(block(x, 6, 2), 6, 2, activation="linear")
    return conv(2, 1, 2)(k.ReLU()(k.Add()([x, y])))


def dilated(rank, rates, padding="same"):
    def build(x):
        for rate in rates:
            x = conv(4, 3, rank, dilation_rate=rate, padding=padding, activation="relu")(x)
        return conv(2, 1, rank)(x)

    return build


def pyramid(x):
    """Dilated branches side by side (ASPP)."""
    x = block(x, 4, 2)
    branches = [conv(3, 1, 2)(x)]
    branches += [block(x, 3, 2, dilation_rate=rate) for rate in (2, 4, 6)]
    return conv(2, 1, 2)(k.Concatenate()(branches))


def separable(x):
    x = k.SeparableConv2D(6, 3, padding="same", activation="relu", depth_multiplier=2)(x)
    x = k.DepthwiseConv2D(5, padding="same")(x)
    x = k.DepthwiseConv2D(3, strides=2, padding="same", activation="swish")(x)
    return conv(2, 1, 2)(x)


def grouped_convolution(x):
    """Which TensorFlow's converters leave as a call to what they did not write."""
    return conv(2, 1, 2)(k.Conv2D(6, 3, padding="same", groups=3)(conv(6, rank=2)(x)))


def mobile(x):
    """Inverted residuals, hard swish, ReLU6."""
    a = conv(4, rank=2, strides=2, activation="hard_silu")(x)
    b = k.BatchNormalization()(conv(12, 1, 2)(a))
    b = k.ReLU(6.0)(b)
    b = k.ReLU(6.0)(k.BatchNormalization()(k.DepthwiseConv2D(3, padding="same")(b)))
    b = k.BatchNormalization()(conv(4, 1, 2)(b))
    return conv(2, 1, 2, activation="hard_sigmoid")(k.Add()([a, b]))


def conv_next(rank, approximate=False):
    """Layer normalisation over channels, GELU, layers that are matrices."""

    def build(x):
        x = conv(4, 2, rank, strides=2, padding="valid")(x)
        x = k.LayerNormalization(epsilon=1e-6)(x)
        y = k.DepthwiseConv2D(7, padding="same")(x) if rank == 2 else conv(4)(x)
        y = k.LayerNormalization(epsilon=1e-6)(y)
        y = k.Dense(8)(y)
        y = function(lambda t: keras.activations.gelu(t, approximate=approximate))(y)
        y = k.Dense(4)(y)
        return conv(2, 1, rank)(k.Add()([x, y]))

    return build


def activations(x):
    """One after the other all that Keras has."""
    for name in ("elu", "selu", "softplus", "softsign", "tanh", "mish", "celu", "gelu", "silu",
                 "leaky_relu", "relu6", "hard_sigmoid", "hard_tanh", "soft_shrink", "hard_shrink",
                 "log_sigmoid", "exponential", "tanh_shrink", "squareplus",
                 "sparse_plus"):  # fmt: skip
        x = conv(4, 1, 2)(x)
        x = k.BatchNormalization()(x)
        x = function(
            lambda t, name=name: (
                getattr(ops, name, None)(t)
                if hasattr(ops, name)
                else keras.activations.get(name)(t)
            )
        )(x)
    return conv(2, 3, 2)(k.PReLU(shared_axes=[1, 2])(conv(3, 3, 2)(x)))


def prelu(x):
    x = k.PReLU(shared_axes=[1, 2, 3])(conv(4, 5)(x))
    y = k.PReLU(shared_axes=[1, 2, 3])(conv(6, 2, strides=2)(x))
    y = k.Conv3DTranspose(4, 2, strides=2)(y)
    return conv(2, 1, activation="sigmoid")(k.Add()([x, k.PReLU(shared_axes=[1, 2, 3])(y)]))


def poolings(x):
    a = k.MaxPooling2D(3, strides=2, padding="same")(conv(4, rank=2)(x))
    b = k.AveragePooling2D(3, strides=1, padding="same")(a)
    c = k.AveragePooling2D(2, padding="valid")(b)
    return conv(2, 1, 2)(c)


def sliding(x):
    x = k.MaxPooling3D(2)(conv(4, padding="valid", activation="relu")(x))
    x = k.MaxPooling3D((1, 2, 2))(conv(6, padding="valid", activation="tanh")(x))
    return conv(2, (2, 3, 3), padding="valid")(x)


def crops(x):
    """A U-Net without padding: the skip is cropped."""
    a = conv(4, padding="valid", activation="relu")(conv(4, padding="valid", activation="relu")(x))
    b = conv(6, padding="valid", activation="relu")(k.MaxPooling3D(2)(a))
    b = k.UpSampling3D(2)(b)
    c = k.Concatenate()([b, k.Cropping3D(2)(a)])
    return conv(2, padding="valid")(c)


def instance(x):
    x = k.GroupNormalization(groups=-1, epsilon=1e-5)(conv(4)(x))
    x = k.LeakyReLU(negative_slope=0.1)(x)
    return conv(2, 1)(x)


def instance_by_hand(x):
    x = conv(4)(x)
    mean = ops.mean(x, axis=(1, 2, 3), keepdims=True)
    variance = ops.var(x, axis=(1, 2, 3), keepdims=True)
    x = (x - mean) / ops.sqrt(variance + 1e-5)
    return conv(2, 1)(ops.relu(x))


def grouped(x):
    x = k.GroupNormalization(groups=2)(conv(6)(x))
    return conv(2, 1)(k.ReLU()(x))


def layer_norm_space(x):
    x = k.LayerNormalization(axis=(1, 2, 3))(conv(4, rank=2)(x))
    return conv(2, 1, 2)(x)


def excited(rank):
    def build(x):
        return conv(2, 1, rank)(squeeze_excite(block(x, 6, rank), rank))

    return build


def classifier(x):
    x = k.MaxPooling2D(2)(block(x, 6, 2))
    x = k.GlobalAveragePooling2D()(block(x, 8, 2))
    return k.Dense(3, activation="softmax")(k.Dropout(0.5)(x))


def flattened(x):
    x = k.MaxPooling3D(2)(conv(4, padding="valid", activation="relu")(x))
    x = k.MaxPooling3D(2)(conv(6, padding="valid", activation="relu")(x))
    x = k.Dense(8, activation="relu")(k.Flatten()(x))
    return k.Dense(3)(x)


def flattened_2d(x):
    x = k.MaxPooling2D(2)(conv(4, rank=2, padding="same", activation="relu")(x))
    x = k.Dense(8, activation="relu")(k.Flatten()(x))
    return k.Dense(3)(x)


def star(x):
    """Two outputs, as StarDist has them."""
    x = unet_body(x)
    return [conv(1, 1, activation="sigmoid")(x), conv(4, 1)(x)]


def unet_body(x):
    a = conv(4, activation="relu")(x)
    b = conv(6, activation="relu")(k.MaxPooling3D((1, 2, 2))(a))
    return conv(4, activation="relu")(k.Concatenate()([k.UpSampling3D((1, 2, 2))(b), a]))


def gated(x):
    """An attention gate: what lies deep says how much of the skip counts."""
    a = block(x, 4)
    g = k.UpSampling3D(2)(block(k.MaxPooling3D(2)(a), 4))
    s = conv(1, 1, activation="sigmoid")(k.ReLU()(k.Add()([conv(3, 1)(a), conv(3, 1)(g)])))
    return conv(2, 1)(k.Concatenate()([k.Multiply()([a, s]), g]))


def shuffled(x):
    x = conv(8, rank=2, activation="relu")(x)
    x = function(lambda t: tf.nn.space_to_depth(t, 2), _half)(x)
    x = conv(12, rank=2, activation="relu")(x)
    return conv(2, rank=2)(function(lambda t: tf.nn.depth_to_space(t, 2), _twice)(x))


def to_skip(x):
    """Resized to the size of a skip, whatever that is."""
    a = block(x, 4, 2)
    b = block(k.MaxPooling2D(2, padding="same")(a), 6, 2)
    b = function(
        lambda t: tf.image.resize(t[0], tf.shape(t[1])[1:3], method="nearest"),
        lambda given: (*given[1][:3], given[0][3]),
    )([b, a])
    return conv(2, 1, 2)(k.Concatenate()([a, b]))


def reflected(x):
    pads = [[0, 0], [2, 2], [2, 2], [0, 0]]
    x = function(lambda t: tf.pad(t, pads, mode="REFLECT"), _wider)(x)
    x = conv(4, 5, 2, padding="valid", activation="relu")(x)
    return conv(2, 1, 2)(x)


def scaled(x):
    x = k.Rescaling(0.5, 0.1)(x)
    x = k.SpatialDropout2D(0.3)(k.GaussianNoise(0.1)(conv(4, rank=2)(x)))
    x = k.UnitNormalization()(x)
    return conv(2, 1, 2)(x)


def spatial_attention(x):
    """Over channels alone: local (CBAM's)."""
    x = conv(4, rank=2)(x)
    s = k.Concatenate()([ops.mean(x, axis=-1, keepdims=True), ops.max(x, axis=-1, keepdims=True)])
    return conv(2, 1, 2)(x * conv(1, 7, 2, activation="sigmoid")(s))


def attended(x):
    x = conv(4, rank=2, strides=4)(x)
    y = k.Reshape((-1, 4))(x)
    y = k.MultiHeadAttention(2, 2)(y, y)
    return conv(2, 1, 2)(k.Reshape(x.shape[1:])(y))


def first(x):
    """Channels first, which TensorFlow computes on processors in 2D."""
    a = k.Conv2D(4, 3, padding="same", activation="relu", data_format="channels_first")(x)
    b = k.BatchNormalization(axis=1)(k.MaxPooling2D(2, data_format="channels_first")(a))
    b = k.Conv2DTranspose(4, 2, strides=2, data_format="channels_first")(b)
    return k.Conv2D(2, 1, data_format="channels_first")(k.Concatenate(axis=1)([a, b]))


def framed(x):
    """A 2D network on every section."""
    x = k.TimeDistributed(k.Conv2D(4, 3, padding="same", activation="relu"))(x)
    return conv(2, (3, 1, 1))(x)


def recurrent(x):
    return k.ConvLSTM2D(3, 3, padding="same", return_sequences=True)(x)


def summed(x):
    """Deep supervision."""
    a = block(x, 4)
    b = block(k.AveragePooling3D(2)(a), 4)
    low = conv(1, 1)(b)
    return [k.Add()([conv(1, 1)(a), k.UpSampling3D(2)(low)]), low]


def valid_transposed(x):
    x = conv(4, activation="relu")(x)
    y = k.Conv3DTranspose(4, 3, strides=2, padding="valid")(k.MaxPooling3D(2)(x))
    y = k.Cropping3D(((0, 1), (0, 1), (0, 1)))(y)
    return conv(2, 1)(k.Concatenate()([x, y]))


def transposed_same(rank, kernel, stride):
    def build(x):
        a = conv(4, rank=rank, activation="relu")(x)
        b = conv(4, 3, rank, strides=stride, activation="relu")(a)
        up = k.Conv3DTranspose if rank == 3 else k.Conv2DTranspose
        b = up(4, kernel, strides=stride, padding="same")(b)
        return conv(2, 1, rank)(k.Concatenate()([a, b]))

    return build


def dense_block(x):
    for _ in range(3):
        y = k.ReLU()(k.BatchNormalization()(x))
        x = k.Concatenate()([x, conv(3, rank=2)(y)])
    return conv(2, 1, 2)(x)


def maxout(x):
    x = conv(8, rank=2)(x)
    a, b = ops.split(x, 2, axis=-1)
    return conv(2, 1, 2)(k.Maximum()([a, b]) - k.Minimum()([a, b]) * k.Average()([a, b]))


def l2(x):
    x = conv(4)(x)
    return function(lambda t: tf.math.l2_normalize(t, axis=-1))(x)


def lrn(x):
    x = conv(4, rank=2)(x)
    return conv(2, 1, 2)(function(lambda t: tf.nn.lrn(t))(x))


def argmax(x):
    return function(
        lambda t: tf.cast(tf.argmax(t, -1), tf.float32)[..., None], lambda g: (*g[:-1], 1)
    )(conv(3)(x))


def up(rank, interpolation=None):
    if rank == 3:
        return lambda channels: k.UpSampling3D(2)
    return lambda channels: k.UpSampling2D(2, interpolation=interpolation or "nearest")


def transposed(rank):
    layer = k.Conv3DTranspose if rank == 3 else k.Conv2DTranspose
    return lambda channels: layer(channels, 2, strides=2)


ENTRIES = {
    "unet_3d": Entry(unet(3, up(3)), V3, S3),
    "unet_3d_transposed": Entry(unet(3, transposed(3), activation="elu"), V3),
    "unet_3d_transposed_same": Entry(transposed_same(3, 3, 2), V3, S3, "tf2onnx"),
    "unet_3d_transposed_valid": Entry(valid_transposed, V3, (), "nchw"),
    "unet_3d_valid": Entry(crops, (18, 22, 20), (18, 22, 26), "tf2onnx"),
    "residual_3d": Entry(residual, (16, 20, 24)),
    "dilated_3d": Entry(dilated(3, (1, 2)), V3),
    "dilated_3d_fixed": Entry(dilated(3, (1, 2)), V3, S3, "tf2onnx", 15),
    "sliding_3d": Entry(sliding, (13, 20, 22), (13, 20, 22)),
    "prelu_3d": Entry(prelu, V3, (), "tf2onnx"),
    "star_3d": Entry(star, (8, 10, 12), (), "tf2onnx", 13),
    "gated_3d": Entry(gated, (10, 14, 18), S3),
    "supervised_3d": Entry(summed, V3),
    "l2_3d": Entry(l2, (7, 9, 11)),
    "argmax_3d": Entry(argmax, V3, S3, "tf2onnx"),
    "conv_next_3d": Entry(conv_next(3), (12, 14, 16)),
    "unet_2d": Entry(unet(2, up(2), channels=(4, 4, 4)), (36, 44), S2),
    "unet_2d_bilinear": Entry(unet(2, up(2, "bilinear")), V2, S2),
    "unet_2d_transposed": Entry(unet(2, transposed(2)), V2, (), "nchw", 11),
    "unet_2d_first": Entry(first, V2, S2, first=True),
    "transposed_same_2d": Entry(transposed_same(2, 4, 2), V2, (), "tf2onnx"),
    "residual_2d": Entry(residual_2d, (41, 45)),
    "dilated_2d": Entry(dilated(2, (1, 2, 4)), (29, 34)),
    "dilated_2d_fixed": Entry(dilated(2, (1, 2, 4)), (29, 34), S2),
    "dilated_2d_valid": Entry(dilated(2, (1, 2, 4), "valid"), (29, 34), (), "tf2onnx"),
    "pyramid_2d": Entry(pyramid, (29, 34)),
    "separable_2d": Entry(separable, V2),
    "mobile_2d": Entry(mobile, V2),
    "conv_next_2d": Entry(conv_next(2), V2),
    "conv_next_2d_tanh": Entry(conv_next(2, approximate=True), V2, S2, "tf2onnx"),
    "dense_2d": Entry(dense_block, V2),
    "activations_2d": Entry(activations, V2),
    "poolings_2d": Entry(poolings, V2),
    "shuffled_2d": Entry(shuffled, V2, (), "tf2onnx"),
    "resized_to_skip_2d": Entry(to_skip, V2),
    "reflected_2d": Entry(reflected, V2),
    "scaled_2d": Entry(scaled, V2),
    "maxout_2d": Entry(maxout, V2),
    "spatial_attention_2d": Entry(spatial_attention, V2, S2, "tf2onnx"),
    "responses_2d": Entry(lrn, V2),
    "instance_3d": Entry(instance, S3),
    "instance_by_hand_3d": Entry(instance_by_hand, S3, S3, "tf2onnx"),
    "group_3d": Entry(grouped, S3),
    "excited_3d": Entry(excited(3), S3, S3),
    "excited_2d": Entry(excited(2), S2),
    "classifier_2d": Entry(classifier, S2),
    "flattened_2d": Entry(flattened_2d, S2, S2, "tf2onnx"),
    "flattened_3d": Entry(flattened, (22, 22, 26), (22, 22, 26)),
    "cubic_2d": Entry(unet(2, up(2, "bicubic")), S2, S2),
    "attention_2d": Entry(attended, S2, S2),
    "recurrent_3d": Entry(recurrent, (6, 12, 16), (6, 12, 16)),
    "normalised_by_place_2d": Entry(layer_norm_space, (12, 14), (12, 14)),
    "grouped_convolution_2d": Entry(grouped_convolution, S2),
}


def main() -> None:
    """Write the files of this folder, all or those named."""
    for name in sys.argv[1:] or ENTRIES:
        keras.utils.clear_session()  # which counts what was made before in the names of nodes
        entry = replace(ENTRIES[name], name=name)
        entry.export(FOLDER / f"{name}.onnx")
        np.savez_compressed(FOLDER / f"{name}.npz", **entry.answers())


if __name__ == "__main__":
    main()
