"""Mixtures where the blocks of a model were."""

import functools

from torch import nn


class Records(list):
    """The losses of the runs of a mixture; a copy of a model has none."""

    def __deepcopy__(self, memo):
        return Records()

    def __reduce__(self):
        return Records, ()


class MixtureBlock(nn.Module):
    """What stands where a block was; its losses stay with it until the model collects them."""

    def __init__(self):
        super().__init__()
        self.records = None

    def record(self, hidden_states, *losses):
        """Note the losses of a run, if the model that runs asks for them; return the result."""
        if self.records is not None:
            self.records.append(losses)
        return hidden_states


class FirstProduct(nn.Module):
    """Stands for the first product of a block: runs its mixture, whose result `last` returns."""

    def __init__(self, mixture, last, width):
        super().__init__()
        self.mixture, self.last, self.width = mixture, [last], width

    def forward(self, hidden_states):
        """Return zeros, on which the functions between the products run, in place or not."""
        self.last[0].results.append(self.mixture(hidden_states))
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.width)


class OtherProduct(nn.Module):
    """Stands for a further product of the input of a block."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, hidden_states):
        """Return zeros."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.width)


class LastProduct(nn.Module):
    """Stands for the last product of a block: returns the result of its mixture.

    Some models scale the weight of a product outside of their forward pass, by its name.
    """

    def __init__(self, mixture, weight):
        super().__init__()
        self.mixture, self.weight_name = [mixture], weight
        self.results = Records()

    def forward(self, _):
        """Return what the mixture computed."""
        return self.results.pop()

    @property
    def weight(self):
        """The weights of this product in all experts, [experts, ...]: one parameter."""
        if not self.weight_name:
            raise AttributeError("the last product of a mixture has several weights")
        return self.mixture[0].get_parameter(self.weight_name)


def place(model, mixture, path, last="", widths=None, weight=""):
    """Put a mixture where a block of a model was.

    Args:
      model: the dense model.
      mixture: the mixture.
      path: the module that the block is; where no module is just the block, its first product.
      last: then, its last product.
      widths: then, the widths of the products of its input: of the first by nothing, of others by
        their modules.
      weight: then, the parameter of the mixture that has the weights of its last product, if one.
    """
    mixture.train(model.get_submodule(path).training)
    mixture.path = path
    if not last:
        model.set_submodule(path, mixture)
        return
    without_fast_paths(model, path)
    end = LastProduct(mixture, weight)
    model.set_submodule(path, FirstProduct(mixture, end, widths[""]))
    for name, width in widths.items():
        if name:
            model.set_submodule(name, OtherProduct(width))
    model.set_submodule(last, end)


def without_fast_paths(model, path):
    """Keep torch's encoder layers around a product from kernels that read its weight themselves."""
    names = path.split(".")
    for depth in range(len(names)):
        owner = model.get_submodule(".".join(names[:depth]))
        if isinstance(owner, nn.TransformerEncoderLayer):
            owner.activation_relu_or_gelu = 0
        if isinstance(owner, nn.TransformerEncoder):
            owner.use_nested_tensor = False


def mixtures_of(model):
    """Return the mixtures of a model."""
    return [m for m in model.modules() if isinstance(m, MixtureBlock)]


def with_losses(forward, summed):
    """Return the forward of a model, which then also computes the losses of its mixtures.

    Args:
      forward: of the model.
      summed: takes the losses of all mixtures, and returns those of the model by name.
    """

    @functools.wraps(forward)
    def sparse_forward(self, *args, **kwargs):
        mixtures = mixtures_of(self)
        for mixture in mixtures:
            mixture.records = Records()
        outputs = forward(self, *args, **kwargs)
        # A mixture that ran several times has the mean of its losses, one that did not run none.
        means = {
            mixture.path: [
                sum(values) / len(values) for values in zip(*mixture.records, strict=True)
            ]
            for mixture in mixtures
        }
        for mixture in mixtures:
            mixture.records = None
        if all(means.values()):
            self.loss_records[:] = [summed(means)]
            return with_added_loss(outputs, self.losses())
        return outputs

    return sparse_forward


def with_added_loss(outputs, losses):
    """Return the outputs of a model with the auxiliary loss of its mixtures added to their `loss`.

    A loss without this name, in a tuple or alone, cannot be told from other results.
    """
    is_dictionary = isinstance(outputs, dict)
    own = outputs.get("loss") if is_dictionary else getattr(outputs, "loss", None)
    if own is None:
        return outputs
    total = own + losses["loss.auxiliary"]
    if isinstance(outputs, tuple):
        return outputs._replace(loss=total)
    if is_dictionary:
        outputs["loss"] = total
    else:
        outputs.loss = total
    return outputs


class SparseModel:
    """What a model with mixtures has besides."""

    def losses(self):
        """Return the losses of the mixtures in the last run, by name."""
        return self.loss_records[0] if self.loss_records else {}

    @functools.cached_property
    def loss_records(self):
        """The losses of the last run, where it had some."""
        return Records()
