"""One file per algorithm, one table of all; the contract is in `base`."""
