"""What comes out of a run: the plain module, exported programs, pictures, the table."""

import importlib.util

import pytest
import torch
from ilnas_testing import images, small_network, train_a_little

from ilnas.additions import add_identity, add_nodes
from ilnas.checkpoint import RunFolder, network_from_state
from ilnas.cli import main
from ilnas.expansion import remove_weights
from ilnas.export import needed_nodes, to_plain
from ilnas.measure import layer_costs, network_macs
from ilnas.plot import kernel_shapes, part_edges
from ilnas.report import describe
from ilnas.template import live_parameters, masked_layers
from ilnas_kernels import MaskedConv2d, Pattern

VARIANTS = [{}, {"stage_output": "last"}, {"reduction": "average", "hidden": []}, {"kernel_size": 5, "head_grid": 1}]
TOLERANCE = 2**-12  # float32 against float32 in another order: some 10^3 terms of size 1, five layers


def grown_network(**changes):
    network = small_network(**changes)
    train_a_little(network)
    for part in [("block", 0, 1), ("block", 0, 1), *(("hidden", i) for i in range(len(network.structure.hidden)))]:
        add_identity(network, part)
    return network.eval()


def cut_off(network, block, node):
    """Remove every live weight that reads a node of the first stage."""
    structure = network.structure
    number = structure.node_offsets()[("block", 0, block)][0] + node
    for name, layer in masked_layers(network):
        if name == f"stages.0.blocks.{block}.conv" or "identities" in name:
            continue
        channels = structure.input_nodes(name)[layer.pattern.col.long() // layer.pattern.taps]
        remove_weights(network, {name: layer.pattern.index[channels == number]}, None)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("squeeze", [True, False])
def test_the_plain_module_computes_the_same(changes, squeeze):
    network = grown_network(**changes)
    plain = to_plain(network, squeeze=squeeze)
    assert not any(isinstance(m, MaskedConv2d) for m in plain.modules())
    x = images(9)
    torch.testing.assert_close(plain(x), network(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_nodes_that_lead_nowhere_are_squeezed_out():
    network = grown_network()
    cut_off(network, 0, 3)
    cut_off(network, 1, 0)
    cut_off(network, 1, 6)
    kept = needed_nodes(network)
    assert kept["block", 0, 0].tolist() == [True, True, True, False, True]
    assert kept["block", 0, 1].tolist() == [False] + [True] * 5 + [False]
    plain = to_plain(network)
    assert [conv.out_channels for conv in plain.stages[0][1].convs] == [5, 5, 5]
    assert plain.stages[0][1].convs[0].in_channels == 2 + 4
    x = images(5)
    torch.testing.assert_close(plain(x), network(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_hidden_nodes_of_the_head_are_squeezed_out():
    network = grown_network(hidden=[9, 6])
    inputs = network.head[0].linear.in_features
    fan_in = [(torch.tensor([0, inputs - 1]), torch.ones(2))] * 2
    add_nodes(network, {("hidden", 0): fan_in})  # no weight leads on from these two
    second = network.head[1].linear
    remove_weights(network, {"head.1.linear": second.pattern.index[second.pattern.col == 4]}, None)
    assert needed_nodes(network)["hidden", 0].tolist() == [True] * 4 + [False] + [True] * 4 + [False] * 2
    plain = to_plain(network)
    assert [layer.out_features for layer in plain.head] == [8, 8, 6, 6, 4]  # with one identity layer behind each
    x = images(5)
    torch.testing.assert_close(plain(x), network(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_network_cut_through_still_exports():
    network = small_network().eval()
    for name, layer in masked_layers(network):
        remove_weights(network, {name: layer.pattern.index}, None)
    x = images(3)
    torch.testing.assert_close(to_plain(network)(x), network(x), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "run"
    given = {
        "widths": "4,4/6",
        "budget": 500,
        "epochs": 2,
        "train_images": 256,
        "nodes": 2,
        "layers": 2,
        "alr": 0.2,
        "hidden": 8,
    }
    arguments = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["search", "--run", str(folder), *arguments]) == 0
    return RunFolder.open(folder)


def test_the_exported_program_runs_without_ilnas(run, capsys):
    assert main(["export", str(run.path)]) == 0
    assert "as a dense module" in capsys.readouterr().out
    program = torch.export.load(run.path / "export" / "network.pt2").module()
    network = network_from_state(run.load()["network"]).eval()
    for batch in (1, 7):
        x = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
        torch.testing.assert_close(program(x), network(x), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="the onnx extra is not installed")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's exporter of itself
def test_onnx_gives_the_same_outputs(run):
    import onnxruntime

    assert main(["export", str(run.path), "--onnx"]) == 0
    session = onnxruntime.InferenceSession(run.path / "export" / "network.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    (got,) = session.run(None, {"images": x.numpy()})
    expected = network_from_state(run.load()["network"]).eval()(x).detach()
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is not None, reason="the onnx extra is installed")
def test_onnx_without_the_extra_says_what_to_install(run, capsys):
    assert main(["export", str(run.path), "--onnx"]) == 1
    assert "pip install 'ilnas[onnx]'" in capsys.readouterr().err


def test_every_picture_is_drawn(run, tmp_path):
    assert main(["plot", str(run.path), "--out", str(tmp_path)]) == 0
    names = {"curves", "live", "density", "graph", "kernels"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    for path in tmp_path.iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_edges_and_shapes_count_live_weights(run):
    network = network_from_state(run.load()["network"])
    assert sum(part_edges(network).values()) == sum(layer.nnz for _, layer in masked_layers(network))
    mask = torch.zeros(3, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 1] = mask[1, 1, 1, 1] = mask[2, 0, 0, 0] = True
    layer = MaskedConv2d(2, 3, 3, mask=Pattern.from_mask(mask))
    shapes, counts = kernel_shapes(layer)
    assert counts.tolist() == [2, 1]
    assert shapes[0].nonzero().flatten().tolist() == [4]


def test_info_adds_up(run, capsys):
    assert main(["info", str(run.path)]) == 0
    printed = capsys.readouterr().out
    network = network_from_state(run.load()["network"])
    costs = layer_costs(network)
    assert sum(cost.live for cost in costs) == live_parameters(network) == 500
    first = costs[0]
    assert first.macs == network.stages[0].blocks[0].conv.nnz * 64
    assert sum(cost.macs for cost in costs) == network_macs(network)
    for words in ("live parameters       500 of", "multiply-accumulates", "training memory", "times as fast"):
        assert words in printed
    assert all(cost.name in printed for cost in costs)
    assert describe(network, run.config(), repeats=1).splitlines()[0].startswith("layer")
