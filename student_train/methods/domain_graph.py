"""How much each domain counts in each layer, from what the domains look like there.

Shapes: L layers (the lowest first), D domains, P of them that are present, H heads of the graph, W width going into a layer of it, V width
coming out of a head, U = 2 V.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.2
"""Of leaky ReLU below 0."""


class DomainGraph(nn.Module):
    """Ratios of domains: for each layer a graph attention network of two layers over domains, all of which are neighbours.

    Dong, Li, Shen, Qiu, "HRKD: Hierarchical Relational Knowledge Distillation for Cross-domain Language Model Compression", EMNLP
    2021, arXiv 2110.08551; sizes are those of the authors' code, which also has dropout of 0.1. Here there is none, so that ratios
    follow from the rows alone. The network is that of Velickovic et al., ICLR 2018, arXiv 1710.10903.

    As ``published``, ratios stay equal: the shares softmax_j(leaky(a_i + b_j)) are the same for each i unless a sum changes its sign, so
    all domains gather the same, and no gradient tells them apart; and ELU, before the softmax of the ratios too, flattens what is
    below 0. Otherwise a domain's own value is added to what it gathers (as Velickovic et al. do for graphs of proteins), and the last
    ELU is left out.

    What it sees of a domain in layer l > 0 is a mixture of what the domain looks like in layers 0 to l: by dot products with a reference,
    which is in turn a mixture of all domains in layer l, by dot products with the domain. Both products go through a learned matrix.
    """

    def __init__(self, layers: int, domains: int, width: int, heads: int, published: bool) -> None:
        super().__init__()
        self.published = published
        self.map = _random(layers, heads, width, width)
        self.attend = _random(layers, heads, 2 * width, 1)
        self.out_map = _random(layers, 1, heads * width, 1)
        self.out_attend = _random(layers, 1, 2, 1)
        self.across = _random(layers - 1, width, width)
        self.along = _random(layers - 1, domains, width, width)

    def forward(self, states_LPW: Tensor, present_P: Tensor) -> Tensor:
        """[L, P] ratios, of sum 1 in each layer, from the mean state of each domain in each layer and the domains' numbers."""
        ratios = []
        for layer, state_PW in enumerate(states_LPW):
            if layer:
                state_PW = self._mixed(states_LPW[: layer + 1], self.across[layer - 1], self.along[layer - 1, present_P])
            inner_PV = F.elu(self._gathered(state_PW, self.map[layer], self.attend[layer]))
            score_P = self._gathered(inner_PV, self.out_map[layer], self.out_attend[layer]).squeeze(-1)
            ratios.append((F.elu(score_P) if self.published else score_P).softmax(-1))
        return torch.stack(ratios)

    def _gathered(self, state_PW: Tensor, map_HWV: Tensor, attend_HU1: Tensor) -> Tensor:
        """[P, H V] one layer of graph attention among all P, the heads side by side."""
        value_HPV = state_PW @ map_HWV
        here_HP1, there_HP1 = (value_HPV @ side_HV1 for side_HV1 in attend_HU1.chunk(2, 1))
        found_HPV = F.leaky_relu(here_HP1 + there_HP1.mT, SLOPE).softmax(-1) @ value_HPV
        return (found_HPV if self.published else found_HPV + value_HPV).transpose(0, 1).flatten(1)

    @staticmethod
    def _mixed(below_LPW: Tensor, across_WW: Tensor, along_PWW: Tensor) -> Tensor:
        """[P, W] mixture over layers of each domain's states; the last layer is the one that it is for."""
        state_PW = below_LPW[-1]
        reference_PW = (state_PW @ across_WW @ state_PW.T).softmax(-1) @ state_PW
        share_LP = torch.einsum("lpi,pij,pj->lp", below_LPW, along_PWW, reference_PW).softmax(0)
        return torch.einsum("lp,lpw->pw", share_LP, below_LPW)


def _random(*shape: int) -> nn.Parameter:
    """Matrices [..., in, out] after Glorot and Bengio (2010), times 1.414."""
    bound = 1.414 * (6 / (shape[-2] + shape[-1])) ** 0.5
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))
