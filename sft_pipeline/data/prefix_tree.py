"""Placeholder until the tree lands."""

import numpy as np


def count_tree_tokens(sequences):
    order = sorted(s.astype(">u4").tobytes() for s in sequences)
    total = 0
    previous = b""
    for s in order:
        a = np.frombuffer(previous, ">u4")
        b = np.frombuffer(s, ">u4")
        m = min(len(a), len(b))
        d = a[:m] != b[:m]
        total += len(b) - (int(d.argmax()) if d.any() else m)
        previous = s
    return total
