"""ATen's operations by what they do to a tensor that is traced: names."""

from __future__ import annotations

# Their result is their first argument, of another shape at most.
ALIASES = {
    "alias", "clone", "contiguous", "expand", "view", "_unsafe_view", "unsqueeze", "squeeze", "lift",
    "lift_fresh", "_to_copy", "to", "view_as", "expand_as",
}  # fmt: skip
# Of these those that share their argument's memory.
VIEWS = ALIASES - {"clone", "_to_copy"} | {"detach"}
# They need the data.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_assert_async"}
# A better message than "unknown": of what sees more than one unit or row, and of what makes another shape.
_REDUCES = {
    "norm", "amax", "amin", "max", "min", "all", "any", "prod", "logsumexp", "_softmax", "_log_softmax",
    "native_group_norm", "native_batch_norm", "cumsum", "split", "chunk", "slice", "select", "index",
    "gather", "sort",
}  # fmt: skip
_MATRICES = {"mm", "addmm", "bmm", "matmul", "linear", "mv", "dot"}
_RESHAPES = {"cat", "stack", "t", "transpose", "permute", "repeat", "tile", "flip", "diagonal", "as_strided"}
WHY_NOT = dict.fromkeys(_REDUCES, "; of what sees more than one unit it has sums, means, variances and norms")
WHY_NOT |= dict.fromkeys(_MATRICES, "; a matrix is one of `matrices`") | dict.fromkeys(
    _RESHAPES, "; it changes the shape"
)
# Their result is memory, for random numbers mostly.
UNSET = {"empty", "empty_like", "new_empty", "empty_strided", "native_dropout"}
# Their result is a condition.
TRUTHS = {
    "lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not", "logical_xor", "isnan", "isinf",
}  # fmt: skip
# Their result is a whole number, or a condition, where their arguments are.
INTEGERS = {
    "add", "sub", "rsub", "mul", "maximum", "minimum", "neg", "abs", "sign", "sgn", "where", "masked_fill", "pow",
    "square", "clamp", "clip", "clamp_min", "clamp_max", "relu", "threshold", "detach", "bitwise_and", "bitwise_or",
    "bitwise_not", "bitwise_xor",
}  # fmt: skip
