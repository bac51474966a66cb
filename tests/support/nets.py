"""Models whose layers nothing divides evenly, and rows for them."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Mlp(nn.Module):
    """Widths that nothing divides, a single output, a layer used twice and one now and then."""

    touch = False
    """Whether calls that do not use the optional layer show it no rows instead of skipping it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 17)
        self.again = nn.Linear(17, 17, bias=False)
        self.extra = nn.Linear(17, 17)
        self.narrow = nn.Linear(17, 5)
        self.output = nn.Linear(5, 1)

    def forward(self, x, extra):
        x = self.first(x).tanh()
        x = self.again(self.again(x).tanh()).tanh()
        if extra:
            x = x + self.extra(x).tanh()
        elif self.touch:
            x = x + self.extra(x[:0]).sum()
        return self.output(self.narrow(x).tanh())

    @staticmethod
    def rows(n):
        return torch.randn(n, 7), torch.randn(n, 1)


class ConvNet(nn.Module):
    """Convolutions with and without bias, padded and strided, and a layer on top."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 3, 2, stride=2, bias=False)
        self.output = nn.Linear(12, 2)

    def forward(self, x, extra):
        return self.output(self.second(self.first(x).tanh()).tanh().flatten(1))

    @staticmethod
    def rows(n):
        return torch.randn(n, 2, 4, 4), torch.randn(n, 2)


class Small(nn.Module):
    """Little to compile; widths that can be cut along both dimensions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 6, bias=False)
        self.output = nn.Linear(6, 6)

    def forward(self, x, extra):
        return self.output(self.second(self.first(x).tanh()).tanh())

    @staticmethod
    def rows(n):
        return torch.randn(n, 6), torch.randn(n, 6)


class Columns(nn.Module):
    """A convolution and GPT-2's layer whose second dimensions can be cut evenly."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 12, (2, 3))
        self.second = Conv1D(12, 12)
        self.output = nn.Linear(12, 6)
        nn.init.normal_(self.second.weight, std=0.3)

    def forward(self, x, extra):
        x = self.first(x.view(-1, 6, 1, 1).expand(-1, -1, 2, 3)).flatten(1).tanh()
        return self.output(self.second(x).tanh())

    @staticmethod
    def rows(n):
        return torch.randn(n, 6), torch.randn(n, 6)


class Tokens(nn.Module):
    """GPT-2's layers, whose weights are stored the other way round; a sample is three tokens."""

    def __init__(self):
        super().__init__()
        self.first = Conv1D(9, 7)
        self.second = Conv1D(5, 9)
        self.output = Conv1D(2, 5)
        for layer in (self.first, self.second, self.output):
            nn.init.normal_(layer.weight, std=0.3)

    def forward(self, x, extra):
        return self.output(self.second(self.first(x).tanh()).tanh())

    @staticmethod
    def rows(n):
        return torch.randn(n, 3, 7) + 1, torch.randn(n, 3, 2) + 1


class Attention(nn.Module):
    """Projections that no module is called for; a sample is four tokens."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.output = nn.Linear(8, 3)

    def forward(self, x, extra):
        x = self.first(x).tanh()
        return self.output(x + self.attention(x, x, x, need_weights=False)[0])

    @staticmethod
    def rows(n):
        return torch.randn(n, 4, 6), torch.randn(n, 4, 3)


class Heads(nn.Module):
    """Two outputs at different depths; a call uses one of them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)
        self.third = nn.Linear(5, 4)
        self.near = nn.Linear(5, 3)
        self.far = nn.Linear(4, 3)

    def forward(self, x, extra):
        x = self.second(self.first(x).tanh()).tanh()
        return self.near(x) if extra else self.far(self.third(x).tanh())

    @staticmethod
    def rows(n):
        return torch.randn(n, 6), torch.randn(n, 3)


class Apart(nn.Module):
    """A row that is not finite reaches one output, and so one row of the weight's gradient."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(6, 5)

    def forward(self, x, extra):
        y = self.output(x.nan_to_num(1.0))
        return torch.cat([y[:, :-1], y[:, -1:] + 0 * x.sum(1, keepdim=True)], dim=1)

    @staticmethod
    def rows(n):
        return torch.randn(n, 6), torch.randn(n, 5)


class TwoDtypes(nn.Module):
    """Each dtype has a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=torch.float32)
        self.second = nn.Linear(8, 5, dtype=torch.float64)
        self.output = nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x, extra):
        return self.output(self.second(self.first(x).tanh().double()).tanh())

    @staticmethod
    def rows(n):
        return torch.randn(n, 6), torch.randn(n, 3, dtype=torch.float64)
