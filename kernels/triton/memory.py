"""Where tensors lie: what csrc/attention_decode.cpp's append checks of memory, in its words."""

from torch import Tensor

_OP = "decode_attention"


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + (last + 1) * tensor.element_size()


def check_append(key_cache: Tensor, value_cache: Tensor, new_key: Tensor, new_value: Tensor) -> None:
    """ValueError where what is written may be what is read, or is written twice. Meta tensors lie nowhere."""
    if key_cache.is_meta or key_cache.numel() == 0 or value_cache.numel() == 0:
        return
    if key_cache.data_ptr() == value_cache.data_ptr():
        raise ValueError(f"{_OP}: value_cache is key_cache, expected memory of its own to write new values to")
    caches = [(name, *_extent(cache)) for name, cache in (("key_cache", key_cache), ("value_cache", value_cache))]
    for name, new in (("new_key", new_key), ("new_value", new_value)):
        if new.numel() == 0:
            continue
        first, stop = _extent(new)
        for cache, cache_first, cache_stop in caches:
            if first < cache_stop and cache_first < stop:
                raise ValueError(f"{_OP}: {name} lies in the memory of {cache}, expected memory of its own")
