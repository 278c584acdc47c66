"""Times other implementations of causal attention, forward and backward, for `stickbreak bench attention --peers`.

Reads one JSON object from standard input:
    device      "cuda:0" or "cpu"
    warm_up     runs before those that are timed
    repeats     runs that are timed
    shapes      objects with batch, heads, kv_heads, length and head_dim
Writes a JSON object a line:
    unavailable reason why nothing can be timed, then nothing more
    note        text for people
    name, pass ("forward" or "backward"), shape, milliseconds (median), fastest_milliseconds
    name, shape, error: what a candidate said that cannot run a shape

On a GPU in bf16, device time between two events around each run; all runs are put on the stream before the first is waited
for, so that the host's time does not count. On a CPU in float32, wall time. Softmax times do not depend on the values, and
the reference stick-breaking op has no early exit: inputs are from N(0, 1).
"""

import json
import math
import sys
import time


def tell(**line):
    print(json.dumps(line), flush=True)


def candidates(torch, cuda, heads, kv_heads, scale):
    """Name and function of q, k and v [batch, heads, length, head_dim] of all that can be timed, and why others cannot."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = {"enable_gqa": True} if kv_heads != heads else {}

    def softmax(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)

        return attend

    version = torch.__version__.split("+")[0]
    if not cuda:
        return [(f"softmax, PyTorch {version}", softmax(SDPBackend.FLASH_ATTENTION))], None
    found = [
        (f"softmax, cuDNN, PyTorch {version}", softmax(SDPBackend.CUDNN_ATTENTION)),
        (f"softmax, FlashAttention-2, PyTorch {version}", softmax(SDPBackend.FLASH_ATTENTION)),
    ]
    try:
        from stickbreaking_attention.sb_attn import sb_attn
    except Exception as error:
        return found, f"the reference stick-breaking op cannot be imported: {type(error).__name__}: {error}"

    def stick_breaking(q, k, v):
        return sb_attn(q, k, v, inv_temp=scale)[0]

    return found + [("stick-breaking, reference Triton op", stick_breaking)], None


def milliseconds(torch, cuda, request, body):
    """Of each timed run, ascending."""
    for _ in range(request["warm_up"]):
        body()
    if not cuda:
        times = []
        for _ in range(request["repeats"]):
            start = time.perf_counter()
            body()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)
    torch.cuda.synchronize()
    event = lambda: torch.cuda.Event(enable_timing=True)
    events = [(event(), event()) for _ in range(request["repeats"])]
    for start, end in events:
        start.record()
        body()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)


def measure(torch, cuda, request, shape, name, attend):
    heads, kv_heads = shape["heads"], shape["kv_heads"]
    options = {"device": request["device"], "dtype": torch.bfloat16 if cuda else torch.float32}

    def random(heads):
        return torch.randn(shape["batch"], heads, shape["length"], shape["head_dim"], **options)

    q, k, v, gradient = random(heads), random(kv_heads), random(kv_heads), random(heads)
    if "stick-breaking" in name and kv_heads != heads:
        # It knows no groups of heads. The copies are not made in the time that is measured.
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def report(passed, times):
        tell(name=name, shape=shape, **{"pass": passed}, milliseconds=times[len(times) // 2], fastest_milliseconds=times[0])

    with torch.no_grad():
        report("forward", milliseconds(torch, cuda, request, lambda: attend(*inputs)))
    out = attend(*inputs)
    backward = lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)
    report("backward", milliseconds(torch, cuda, request, backward))


def main():
    request = json.load(sys.stdin)
    cuda = request["device"] != "cpu"
    try:
        import torch

        if cuda and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch sees no GPU")
        if cuda:
            torch.cuda.set_device(request["device"])
    except Exception as error:
        tell(unavailable=f"{type(error).__name__}: {error}")
        return
    torch.manual_seed(1)
    told = {None}
    for shape in request["shapes"]:
        scale = 1 / math.sqrt(shape["head_dim"])
        found, note = candidates(torch, cuda, shape["heads"], shape["kv_heads"], scale)
        if note not in told:
            told.add(note)
            tell(note=note)
        for name, attend in found:
            try:
                measure(torch, cuda, request, shape, name, attend)
            except Exception as error:
                tell(name=name, shape=shape, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
            if cuda:
                torch.cuda.empty_cache()


main()
