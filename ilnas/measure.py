"""What a network costs: live parameters, density and multiply-accumulates by layer."""

from dataclasses import dataclass

from ilnas.template import Network, live_bias, live_parameters, masked_layers


@dataclass(frozen=True)
class LayerCost:
    """One layer: live weights and biases, all of them, and multiply-accumulates for one image, live and if dense."""

    name: str
    live: int
    size: int
    macs: int
    dense_macs: int

    @property
    def density(self) -> float:
        return self.live / self.size if self.size else 0.0


def layer_costs(network: Network) -> list[LayerCost]:
    """Costs from input to output."""
    costs = []
    for name, layer in masked_layers(network):
        positions = 1
        if name.startswith("stages."):
            height, width = network.structure.resolution(int(name.split(".")[1]))
            positions = height * width
        size = layer.pattern.numel + layer.pattern.shape[0]
        macs = layer.nnz * positions, layer.pattern.numel * positions
        costs.append(LayerCost(name, layer.nnz + live_bias(layer), size, *macs))
    return costs


def network_macs(network: Network) -> int:
    """Multiply-accumulates of live weights in one forward pass of one image."""
    return sum(cost.macs for cost in layer_costs(network))


def network_density(network: Network) -> float:
    """Live weights and biases over all positions."""
    return live_parameters(network) / network.structure.dense_parameters()
