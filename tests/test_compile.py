import pytest
import torch

from fmxnn import (
    BatchTopK,
    CPWeight,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    LayerMask,
    TensorRingWeight,
    TopK,
)

MAKERS = {
    "dense": lambda: DenseWeight(2, 4, 12),
    "ring": lambda: TensorRingWeight(2, 4, 12, ranks=(2, 3, 2)),
    "cp": lambda: CPWeight(2, 4, 12, rank=3),
}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # from inside torch's inductor
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_crosscoder_compiles_as_one_graph_and_equals_eager(name, training, dtype):
    torch.compiler.reset()
    gate = TopK(3) if name == "cp" else BatchTopK(3)
    encoder = CrossLayerEncoder(MAKERS[name](), gate, mask=LayerMask(0.3))
    coder = Crosscoder(encoder, CrossLayerDecoder(MAKERS[name]())).to(dtype).train(training)
    compiled = torch.compile(coder, fullgraph=True, options={"fallback_random": True})
    x = torch.randn(6, 2, 4, dtype=dtype)
    results = []
    for run in (coder, compiled):
        torch.manual_seed(1)
        if isinstance(gate, BatchTopK):
            gate.threshold.fill_(-1.0)
        coder.zero_grad()
        x_hat = run(x)
        x_hat.pow(2).sum().backward()
        tensors = *(p.grad for p in coder.parameters()), *coder.buffers()
        results.append([x_hat.detach(), *(tensor.clone() for tensor in tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("name", MAKERS)
def test_activations_of_another_dtype_compile_under_autocast(name):
    torch.compiler.reset()
    coder = Crosscoder(CrossLayerEncoder(MAKERS[name](), TopK(3)), CrossLayerDecoder(MAKERS[name]())).eval()
    compiled, x = torch.compile(coder, fullgraph=True, backend="eager"), torch.randn(6, 2, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), coder(x))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_threshold_follows_training_in_a_compiled_graph(dtype):
    torch.compiler.reset()
    compiled, eager = BatchTopK(3).to(dtype), BatchTopK(3).to(dtype)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for pre in torch.randn(3, 6, 12, dtype=dtype):
        torch.testing.assert_close(run(pre), eager(pre))
    torch.testing.assert_close(compiled.threshold, eager.threshold)
