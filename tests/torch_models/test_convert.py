"""Modules of PyTorch with mixtures in place of their blocks."""

import subprocess
import sys
from collections import namedtuple
from copy import deepcopy
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("jax", reason="jax is not installed")

from torch import nn  # noqa: E402

from moecc import torch as mt  # noqa: E402
from moecc.errors import InputError, UsageError  # noqa: E402

from .models import HIDDEN, WIDTH, Block, Language, Whole, tokens  # noqa: E402

F = nn.functional
PIPELINE = "upcycle{experts=4 top-k=2},add-losses{metrics=false}"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def converted(*layers, pipeline=PIPELINE):
    """Return a dense model in float64 and what became of it."""
    torch.manual_seed(0)
    model = Language(*layers).double().eval()
    return model, mt.convert(model, tokens(), pipeline)


def rejection(*layers):
    """Return why nothing is converted."""
    torch.manual_seed(0)
    with pytest.raises(InputError) as error:
        mt.convert(Language(*layers).double().eval(), tokens(), PIPELINE)
    return str(error.value)


def close(a, b):
    return bool(torch.allclose(a, b, rtol=0, atol=1e-12))


def test_a_module_that_is_the_block_is_replaced():
    model, moe = converted(Whole(), Whole())
    assert [place.path for place in moe.conversion.places] == ["layers.0.mlp", "layers.1.mlp"]
    assert close(moe(tokens()), model(tokens()))
    assert isinstance(moe, Language)
    assert type(model) is Language
    assert moe.embed.weight is model.embed.weight
    assert moe.layers[0].mlp.experts.gate.weight.shape == (4, HIDDEN, WIDTH)


def test_a_block_between_two_products_has_a_pair_of_modules():
    model, moe = converted(Block(), Block())
    assert moe.conversion.places[0].path == "layers.0.up"
    assert moe.conversion.places[0].last == "layers.0.down"
    assert close(moe(tokens()), model(tokens()))


class Chunked(Block):
    """Both factors of the hidden values are halves of one product."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * HIDDEN)

    def hidden(self, x):
        gate, value = self.up(x).chunk(2, dim=-1)
        return F.gelu(gate) * value


class Clamped(Block):
    """Hidden values have a largest one, and a smallest one on another way."""

    def hidden(self, x):
        hidden = self.up(x)
        return F.silu(hidden.clamp(max=0.1)) * hidden.clamp(min=-0.1, max=0.2)


class InPlace(Block):
    """What is read last is what the operations in place left, of another node of the graph."""

    def hidden(self, x):
        hidden = self.up(x)
        hidden.add_(1).mul_(2)
        return hidden.relu_()


class Flat(Whole):
    """The block is a module that has the tokens of all rows, as experts of mixtures are."""

    def forward(self, x):
        return x + self.mlp(self.norm(x).view(-1, WIDTH)).view(x.shape)


@pytest.mark.parametrize(
    ("layer", "path"),
    [
        (Chunked, "layers.0.up"),
        (Clamped, "layers.0.up"),
        (InPlace, "layers.0.up"),
        (Flat, "layers.0.mlp"),
    ],
)
def test_halves_bounds_and_tokens_of_all_rows(layer, path):
    model, moe = converted(layer())
    assert [place.path for place in moe.conversion.places] == [path]
    ids = torch.cat([tokens(), tokens()])
    assert close(moe(ids), model(ids))


@pytest.mark.parametrize("layer", [Whole, Block])
def test_experts_and_router_have_gradients_of_a_mixture_by_hand(layer):
    _, moe = converted(layer(), pipeline="upcycle{experts=4 top-k=2}")
    (mixture,) = [m for m in moe.modules() if type(m).__name__ == "SparseFeedForward"]
    for param in mixture.parameters():
        param.data += torch.randn_like(param)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    scores, index = (x @ mixture.router.weight.T).topk(2)
    experts = mixture.experts
    every = []
    for e in range(4):
        if layer is Whole:
            hidden = F.silu(x @ experts.gate.weight[e].T) * (x @ experts.up.weight[e].T)
            every.append(hidden @ experts.down.weight[e].T)
        else:
            hidden = F.gelu(x @ experts.up.weight[e].T + experts.up.bias[e])
            every.append(hidden @ experts.down.weight[e].T + experts.down.bias[e])
    chosen = torch.stack(every, -2).gather(-2, index[..., None].expand(2, 5, 2, WIDTH))
    expected = (chosen * scores.softmax(-1)[..., None]).sum(-2)
    inputs = [x, *mixture.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    result = mixture(x)
    assert close(result, expected)
    for a, b in zip(torch.autograd.grad(result.square().sum(), inputs), wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_losses_of_the_last_run_have_gradients():
    _, moe = converted(Whole(), Block())
    assert moe.losses() == {}
    moe(tokens())
    losses = moe.losses()
    assert set(losses) == {"loss.balance", "loss.router_z", "loss.auxiliary"}
    losses["loss.auxiliary"].backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for name, p in moe.named_parameters()
        if "router" in name
    )


Named = namedtuple("Named", ["loss", "logits"])


@pytest.mark.parametrize(
    ("wrap", "loss_of"),
    [
        (lambda loss: {"loss": loss}, lambda outputs: outputs["loss"]),
        (lambda loss: SimpleNamespace(loss=loss), lambda outputs: outputs.loss),
        (lambda loss: Named(loss, None), lambda outputs: outputs.loss),
        (lambda loss: {"logits": loss}, None),
        (lambda loss: (loss, loss), None),
    ],
)
def test_the_auxiliary_loss_is_added_to_a_loss_of_that_name_alone(wrap, loss_of):
    class Trained(Language):
        def forward(self, ids, wrap=lambda loss: loss):
            return wrap(super().forward(ids).square().mean())

    model = Trained(Whole()).double().eval()
    moe = mt.convert(model, tokens(), PIPELINE)
    outputs, dense = moe(tokens(), wrap), model(tokens())
    if loss_of is None:
        assert close(next(iter(getattr(outputs, "values", lambda: outputs)())), dense)
    else:
        assert close(loss_of(outputs), dense + moe.losses()["loss.auxiliary"])
    assert any("add it yourself" in remark for remark in moe.conversion.report.remarks)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mask", [None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])])
def test_an_encoder_of_torch_does_not_run_its_fused_kernels(mask):
    class Encoder(Language):
        def forward(self, ids, mask=None):
            return self.head(self.layers[0](self.embed(ids), src_key_padding_mask=mask))

    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True)
    model = Encoder(nn.TransformerEncoder(layer, 2)).double().eval()
    moe = mt.convert(model, tokens(), "upcycle{experts=4 top-k=2 layers=0}", causal=False)
    with torch.no_grad():
        expected, result = model(tokens(), mask), moe(tokens(), mask)
    read = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    assert close(result[read], expected[read])


def test_a_layer_that_runs_twice_is_one_mixture():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Whole()

        def forward(self, x):
            return self.layer(self.layer(x))

    model, moe = converted(Twice())
    assert len(moe.conversion.places) == 1
    assert close(moe(tokens()), model(tokens()))
    layer = Whole()
    assert "several names" in rejection(nn.Sequential(layer, layer))


def test_dropout_before_the_last_product_stays():
    _, moe = converted(Whole(dropout=0.5))
    assert close(moe(tokens()), moe(tokens()))
    moe.train()
    torch.manual_seed(1)
    first = moe(tokens())
    assert not close(first, moe(tokens()))
    torch.manual_seed(1)
    assert close(first, moe(tokens()))


def test_a_dropout_that_only_training_has_stays():
    class Dropping(Block):
        def hidden(self, x):
            hidden = F.gelu(self.up(x))
            return F.dropout(hidden, 0.5) if self.training else hidden

    _, moe = converted(Dropping())
    assert [place.dropout for place in moe.conversion.places] == [0.5]


def test_gradients_that_are_off_around_a_block_are_no_part_of_it():
    class Frozen(Whole):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    _, moe = converted(Frozen(), Block())
    assert len(moe.conversion.places) == 2
    assert not moe.conversion.report.misses


def test_sizes_that_a_model_is_bound_to_are_remarked():
    class Bound(Block):
        def forward(self, x):
            return super().forward(x.view(-1, 5, WIDTH))

    class Sized(Block):
        def forward(self, x):
            return super().forward(x.view(2, 5, WIDTH))

    for layer, axes in ((Bound(), ["second axis"]), (Sized(), ["batch", "second axis"])):
        model, moe = converted(layer)
        remarks = [r for r in moe.conversion.report.remarks if "torch.export" in r]
        assert len(remarks) == len(axes)
        assert all(map(str.__contains__, remarks, axes))
        assert close(moe(tokens()), model(tokens()))


def test_the_dense_model_keeps_its_mode():
    model = Language(Whole(), Block()).train()
    model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    moe = mt.convert(model, tokens(), PIPELINE)
    assert [m.training for m in model.modules()] == modes
    assert moe.layers[0].mlp.training
    assert not moe.layers[1].up.mixture.training


def test_the_weights_of_a_replaced_product_are_scaled_by_its_name():
    # RWKV halves the last weights of later blocks before the first pass in evaluation.
    model, moe = converted(Block())
    moe = deepcopy(moe)
    with torch.no_grad():
        for part in (model, moe):
            part.layers[0].down.weight.div_(2)
    assert close(moe(tokens()), model(tokens()))
    _, moe = converted(Block(), pipeline="upcycle{experts=4 top-k=2 shared=0.5}")
    assert not hasattr(moe.layers[0].down, "weight")


def test_a_block_whose_result_the_model_drops_keeps_its_bias():
    # The head of SigLIP runs in its classifier, which has no use for it.
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Block()

        def forward(self, x):
            self.head(x)
            return x

    model, moe = converted(Idle(), Block())
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    assert close(moe.layers[0].head(x), model.layers[0].head(x))


def test_a_copy_is_independent(tmp_path):
    _, moe = converted(Block())
    with pytest.raises(InputError, match=r"cannot be pickled[^~]*moe\.save_pretrained"):
        torch.save(moe, tmp_path / "model.pt")
    moe(tokens())
    copy = deepcopy(moe)
    before = moe(tokens())
    with torch.no_grad():
        copy.layers[0].up.mixture.experts.up.weight.zero_()
    assert not close(copy(tokens()), before)
    assert close(moe(tokens()), before)


def test_half_precision_and_meta():
    torch.manual_seed(0)
    model = Language(Whole()).bfloat16().eval()
    moe = mt.convert(model, tokens(), PIPELINE)
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    assert torch.allclose(moe(tokens()), model(tokens()), atol=0.05)
    moe = mt.convert(deepcopy(model).to("meta"), tokens().to("meta"), PIPELINE)
    assert all(p.is_meta for p in moe.parameters())


def test_five_steps_of_training():
    _, moe = converted(Whole(), Block())
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    values = []
    for _ in range(5):
        logits = moe(tokens())[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, tokens()[:, 1:].flatten())
        values.append(loss.item())
        optimizer.zero_grad()
        (loss + moe.losses()["loss.auxiliary"]).backward()
        optimizer.step()
    assert values[-1] < values[0]


def test_a_folder_is_loaded_bit_for_bit_and_known_to_the_commands(tmp_path):
    model, moe = converted(Whole(), Block())
    moe.save_pretrained(tmp_path)
    loaded = mt.load(tmp_path, deepcopy(model))
    stored = dict(loaded.named_parameters())
    assert all(torch.equal(p, stored[n]) for n, p in moe.named_parameters())
    assert close(loaded.eval()(tokens()), moe(tokens()))
    moe.save_pretrained(tmp_path)  # as a trainer does, again
    for command, said in (("inspect", "read by     moecc.torch.load"), ("verify", "")):
        words = [sys.executable, "-m", "moecc", command, str(tmp_path)]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout


class Positioned(Language):
    """A buffer that is not saved."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("scale", torch.ones(1), persistent=False)


def test_a_model_without_weights_is_filled_with_those_of_a_folder(tmp_path):
    model = Language(Whole(), Block()).eval()
    model.head.weight = model.embed.weight
    moe = mt.convert(model, tokens(), PIPELINE)
    moe.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = Language(Whole(), Block()).eval()
    empty.head.weight = empty.embed.weight
    loaded = mt.load(tmp_path, empty)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(tokens()), moe(tokens()))
    moe = mt.convert(empty, tokens().to("meta"), PIPELINE)
    with pytest.raises(
        InputError, match=r"embed\.weight: a model on the device meta has no weights"
    ):
        moe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_that_a_folder_does_not_fit_is_refused_by_names(tmp_path):
    mt.convert(Positioned(Whole()), tokens(), PIPELINE).save_pretrained(tmp_path)
    wider, deeper = Positioned(Whole()), Positioned(Whole(), Block())
    wider.head = nn.Linear(WIDTH, 7)
    with torch.device("meta"):
        empty = Positioned(Whole())
    for model, words in (
        (Language(Whole()), ["another class", "with a Positioned", "found: Language"]),
        (Positioned(Block()), ["layers.0.mlp: the model has no such module"]),
        (deeper, ["layers.1.down.bias: the folder has no such tensor"]),
        (wider, ["head.bias: the folder has no", "head.weight: the model has another", "[7, 8]"]),
        (empty, ["scale: a buffer that is not saved is on the device meta"]),
    ):
        with pytest.raises(InputError) as error:
            mt.load(tmp_path, model)
        assert all(word in str(error.value) for word in words)


# What is no block, and why.


class UsedElsewhere(Block):
    def forward(self, x):
        hidden = self.hidden(self.norm(x))
        return x + self.down(hidden) + hidden.mean(-1, keepdim=True)


class Functional(Block):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        x = self.norm(x)
        hidden = F.gelu(F.linear(x, self.up.weight, self.up.bias))
        return x * self.scale + F.linear(hidden, self.down.weight, self.down.bias)


class Mixing(Block):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 5)

    def forward(self, x):
        return x + self.down(self.hidden(self.norm(x).mT)).mT


class Viewed(Block):
    """An operation in place changes a part of the hidden values."""

    def hidden(self, x):
        hidden = self.up(x)
        hidden[..., 0] = 0
        return F.gelu(hidden)


class Twice(Block):
    def hidden(self, x):
        return F.gelu(self.up(x)) + self.up(x)


class Sparsified(Block):
    """Hidden values below a bound of their own statistics are zero, as in Gemma 3n."""

    def hidden(self, x):
        hidden = self.up(x)
        share = torch.distributions.Normal(0, 1).icdf(torch.tensor(0.8)).to(x.dtype)
        bound = hidden.mean(-1, keepdim=True) + hidden.std(-1, keepdim=True) * share
        return F.gelu(F.relu(hidden - bound))


class Adapted(Block):
    """An adapter beside the first product."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, HIDDEN, bias=False)

    def hidden(self, x):
        return F.gelu(self.up(x) + self.b(self.a(x)))


class Masked(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.ones(HIDDEN))

    def hidden(self, x):
        return F.gelu(self.up(x)) * self.kept


class Rounded(Block):
    def hidden(self, x):
        return F.gelu(self.up(x).half()).to(x.dtype)


class EarlyDropout(Block):
    def hidden(self, x):
        return F.gelu(F.dropout(self.up(x), 0.5, self.training))


class Quantised(Block):
    """Weights of the first product are whole numbers in a buffer, with a scale."""

    def __init__(self):
        super().__init__()
        numbers = torch.randint(-127, 127, (HIDDEN, WIDTH), dtype=torch.int8)
        self.register_buffer("numbers", numbers)

    def hidden(self, x):
        return F.gelu(F.linear(x, self.numbers.to(x.dtype) * 0.01))


class Scaled(nn.Linear):
    def forward(self, x, scale=1):
        return super().forward(x) * scale


class FurtherArguments(Block):
    def __init__(self):
        super().__init__()
        self.up = Scaled(WIDTH, HIDDEN)

    def hidden(self, x):
        return F.gelu(self.up(x, 1))


class Averaged(Block):
    """A number of tokens, which the trace has as a number."""

    def hidden(self, x):
        return F.gelu(self.up(x)) / x.shape[1]


class LengthDependent(Block):
    def hidden(self, x):
        return F.gelu(self.up(x)) if x.shape[1] < 6 else F.relu(self.up(x))


class ModeDependent(Block):
    def hidden(self, x):
        return F.gelu(self.up(x)) if self.training else F.relu(self.up(x))


class Detached(Block):
    def hidden(self, x):
        with torch.no_grad():
            hidden = self.up(x)
        return F.gelu(hidden)


class Ungraded(nn.Linear):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def with_ungraded_product():
    layer = Block()
    layer.down = Ungraded(HIDDEN, WIDTH)
    return layer


@torch.library.custom_op("moecc_tests::up", mutates_args=())
def kernel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A product in a kernel of its own."""
    return x @ weight.T


@kernel.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Kernel(Block):
    def hidden(self, x):
        return F.gelu(kernel(x, self.up.weight))


def normed():
    layer = Block()
    layer.up = nn.utils.parametrizations.weight_norm(layer.up)
    return layer


def shared():
    first, second = Block(), Block()
    second.up.weight = first.up.weight
    return first, second


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((UsedElsewhere(),), "a hidden value is also used"),
        ((Functional(),), "no module of its own"),
        ((Mixing(),), "it mixes them"),
        ((Viewed(),), "no feed-forward block"),
        ((Twice(),), "runs twice"),
        ((Sparsified(),), "mixes its hidden values"),
        ((Adapted(),), "different values"),
        ((Masked(),), "it also takes `b_layers_0_kept` from outside"),
        ((EarlyDropout(),), "dropout inside it is not before its last product"),
        ((normed(),), "computed"),
        ((Quantised(),), "made of buffers, as of a quantised layer"),
        ((Kernel(),), "a kernel that shows none"),
        ((FurtherArguments(),), "takes further arguments"),
        ((Rounded(),), "narrower than its input"),
        ((Averaged(),), "something else for batches or sequences of another length"),
        ((LengthDependent(),), "something else for batches or sequences of another length"),
        ((ModeDependent(),), "something else in training"),
        ((Detached(),), "gradients are switched in it"),
        ((with_ungraded_product(),), "gradients are switched in it"),
        (shared(), "another"),
    ],
    ids=lambda x: type(x[0]).__name__ if isinstance(x, tuple) else "",
)
def test_what_is_no_block_is_said_with_its_reason(layers, words):
    assert words in rejection(*layers)


def test_names_in_another_order_do_not_swap_weights():
    # A ParameterDict of a dict sorts its keys: bias comes before weight.
    class Dictionary(Block):
        def __init__(self):
            super().__init__()
            weights = {"w": self.up.weight.data, "b": self.up.bias.data}
            self.inner = nn.ParameterDict({n: nn.Parameter(t) for n, t in weights.items()})
            self.up = Product(self.inner)

    class Product(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = weights

        def forward(self, x):
            return F.linear(x, self.weights["w"], self.weights["b"])

    model, moe = converted(Dictionary())
    assert close(moe(tokens()), model(tokens()))


def test_warnings_frozen_routers_and_a_class_that_no_program_imports_are_remarked():
    class Local(Language):
        pass

    pipeline = "upcycle{experts=3 top-k=1}"
    kinds = (Language(Block()), False), (Local(Block()), True)
    for model, is_local in kinds:
        model.layers.requires_grad_(is_local)
        remarks = mt.convert(model, tokens(), pipeline).conversion.report.remarks
        assert any("layers.0: its router is frozen" in r for r in remarks) is not is_local
        assert any("option top-k: the gate of one expert, renormalised" in r for r in remarks)
        assert any("define the class at the top" in r for r in remarks) is is_local


def test_a_type_taken_from_another_value_is_none_from_outside():
    class Typed(Block):
        def hidden(self, x):
            return F.gelu(self.up(x)).type_as(x)

    model, moe = converted(Typed())
    assert close(moe(tokens()), model(tokens()))


def test_bad_input(capfd):
    model = Language(Block())
    with pytest.raises(InputError, match=r"convert model\._orig_mod"):
        mt.convert(torch.compile(model), tokens(), PIPELINE)
    with pytest.raises(InputError, match="the model has mixtures already"):
        mt.convert(mt.convert(model, tokens(), PIPELINE), tokens(), PIPELINE)
    with pytest.raises(UsageError, match="not a module"):
        mt.convert(lambda x: x, tokens(), PIPELINE)
    for inputs, words in (
        ({"wrong": tokens()}, r"expected: \(ids\)\n  found: missing a required argument: 'ids'"),
        ((tokens(), tokens()), "too many positional arguments"),
    ):
        with pytest.raises(InputError, match=words):
            mt.convert(model, inputs, PIPELINE)

    class Branching(Block):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(
        InputError, match=r"test_convert\.py:\d+ in forward: torch\.export"
    ) as error:
        mt.convert(Language(Branching()), tokens(), PIPELINE)
    assert "no `if` or loop in Python" in str(error.value)
    assert capfd.readouterr().err == ""

    class Narrow(Block):
        def forward(self, x):
            return super().forward(x[..., 1:])

    with pytest.raises(InputError, match="the model must run with these inputs"):
        mt.convert(Language(Narrow()), tokens(), PIPELINE)

    class Selecting(Block):
        def forward(self, x):
            return x + super().forward(x[x.sum(-1) > 0]).sum()

    with pytest.raises(InputError, match="sizes of a value, which depend on other values"):
        mt.convert(Language(Selecting()), tokens(), PIPELINE)
    with pytest.raises(InputError, match="no feed-forward block"):
        mt.convert(Language(nn.Linear(WIDTH, WIDTH)), tokens(), PIPELINE)
