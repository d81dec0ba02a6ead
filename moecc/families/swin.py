"""swin: an encoder of images that attends within windows, which every second block shifts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, lcm

from moecc.families.config import BlockNames, config_class, number, size
from moecc.families.heads import CLASSIFIER
from moecc.families.reader import COUNT, LAYERS, NEURONS, WIDTH, KeyProblem, Reader, key_problem
from moecc.families.shrinking import SMALL_HEAD_DIM, SMALL_PATCH, shrink_size
from moecc.families.vision import VISION_DEFAULTS, VisionConfig, read_ratio
from moecc.support.untyped import JsonDict

MOST_STAGES, MOST_WINDOW = 16, 1 << 10


@dataclass(frozen=True, slots=True)
class SwinStage:
    """The blocks between two merges of patches.

    Attributes:
      number: which stage it is.
      width: the width of a patch.
      grid: the rows and columns of patches.
      window: the side of a window in patches.
      shift: by how many patches every second block shifts its windows; 0 where one window holds
        a side of the image.
      heads: the number of heads.
      depth: the number of blocks.
    """

    number: int
    width: int
    grid: tuple[int, int]
    window: int
    shift: int
    heads: int
    depth: int


@config_class
class SwinConfig(VisionConfig):
    """A swin; `hidden_size` is the width of the first stage, and each further one has twice that.

    `depths` and `heads` have one entry a stage.  `mlp_ratio` is the width of a feed-forward block
    over that of its stage.
    """

    model_type = "swin"
    architecture = "SwinModel"
    graphs = "swin"
    head_prefix = "swin."
    head_steps = {"ImageClassification": ("mean", CLASSIFIER)}
    keys = {
        "hidden_size": "embed_dim",
        "intermediate_size": "",
        "num_hidden_layers": "",
        "num_attention_heads": "",
    }
    only = {
        "use_absolute_embeddings": (
            False, "transformers 4 and 5 have tables of other sizes for these positions",
        ),
    }  # fmt: skip
    # What follows from other keys, of training, and of other classes.
    idle = (
        *("hidden_size", "num_layers", "path_norm", "encoder_stride", "stage_names"),
        *("out_features", "out_indices", "_out_features", "_out_indices"),
    )
    # transformers sets the one by the other before it sets all.
    synonyms = {"num_attention_heads": "num_heads"}
    kept_numbers = (*VisionConfig.kept_numbers, "drop_path_rate")
    names = BlockNames(
        embedding="",
        around=("embeddings.norm", "layernorm"),
        layer="encoder.layers.{layer}.",
        norms=("layernorm_before", "layernorm_after"),
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        fc_in="intermediate.dense",
        fc_out="output.dense",
    )
    # The file of transformers 4 has the numbers of rows, which follow from the window.
    unread = r"(?:swin\.)?encoder\..+\.attention\.self\.relative_position_index"
    defaults = {
        **{key: value for key, value in VISION_DEFAULTS.items() if key != "hidden_size"},
        "patch_size": 4,
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "mlp_ratio": 4.0,
        "drop_path_rate": 0.1,
        "use_absolute_embeddings": False,
        "layer_norm_eps": 1e-5,
    }

    hidden_size: int = size(WIDTH)
    intermediate_size: int = size(NEURONS, default=0)
    num_hidden_layers: int = size(LAYERS, default=0)
    num_attention_heads: int = size(COUNT, default=0)
    layer_norm_eps: float = number(least=0, default=1e-5)
    depths: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    window_size: int = size(MOST_WINDOW, default=7)
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_hidden_layers", sum(self.depths))
        object.__setattr__(self, "intermediate_size", self.block_width(self.hidden_size))
        super().__post_init__()

    def block_width(self, width: int) -> int:
        """Return the width of a feed-forward block in a stage of some width."""
        return int(self.mlp_ratio * width)

    @property
    def stages(self) -> tuple[SwinStage, ...]:
        """The stages, in order."""
        stages = []
        height, width = (n // self.patch_size for n in self.image_size)
        for at, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            grid, window = (height >> at, width >> at), self.window_size
            shift = 0 if min(grid) <= window else window // 2
            stages.append(SwinStage(at, self.hidden_size << at, grid, window, shift, heads, depth))
        return tuple(stages)

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        side = min(self.window_size, 2 + self.window_size % 2)
        patch = shrink_size(self.patch_size, SMALL_PATCH)
        # The heads of each stage divide its width.
        least = lcm(*(n // gcd(n, 1 << stage) for stage, n in enumerate(self.heads)))
        windows = (n // self.patch_size // self.window_size for n in self.image_size)
        return {
            "hidden_size": least * shrink_size(self.hidden_size // least, SMALL_HEAD_DIM),
            "patch_size": patch,
            "window_size": side,
            "image_size": tuple(count * side * patch for count in windows),
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if len(self.depths) != len(self.heads) or not 1 <= len(self.depths) <= MOST_STAGES:
            shown = f"{len(self.depths)} and {len(self.heads)}"
            fault, expected = "not one entry for each stage", f"1 to {MOST_STAGES} stages"
            yield key_problem(fault, expected, shown, "depths", "num_heads")
            return
        if not all(1 <= n <= LAYERS for n in self.depths) or self.num_hidden_layers > LAYERS:
            yield key_problem("not usable depths", "1 or more blocks", f"{self.depths}", "depths")
        if not 1 <= self.intermediate_size << (len(self.depths) - 1) <= NEURONS:
            shown = f"{self.intermediate_size}"
            yield key_problem("not a usable size", f"1 to {NEURONS:,}", shown, "mlp_ratio")
        for stage in self.stages:
            if stage.heads < 1 or stage.width % stage.heads:
                fault, shown = "the heads of a stage do not divide its width", f"{stage.heads}"
                yield key_problem(
                    fault, f"a divisor of {stage.width}", shown, "num_heads", "embed_dim"
                )
        yield from self._grid_checks()

    def _grid_checks(self) -> Iterator[KeyProblem]:
        if self.patch_size < 1 or any(n < 1 or n % self.patch_size for n in self.image_size):
            return
        keys = ("image_size", "patch_size", "window_size", "depths")
        for stage in self.stages:
            shown = f"{stage.grid[0]} x {stage.grid[1]} patches in stage {stage.number + 1}"
            if min(stage.grid) < stage.window:
                fault = "transformers rejects windows that are larger than the image"
                yield key_problem(fault, f"at least {stage.window} a side", shown, *keys)
                return
            if any(n % stage.window for n in stage.grid):
                fault = "the patches of a stage are not cut into whole windows, and moecc pads none"
                yield key_problem(fault, f"multiples of {stage.window}", shown, *keys)
                return
            is_last = stage.number == len(self.depths) - 1
            if not is_last and any(n % 2 for n in stage.grid):
                fault = "patches are merged two by two, and moecc pads none"
                yield key_problem(fault, "an even number a side", shown, *keys)
                return

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        depths, heads = reader.whole_numbers("depths"), reader.whole_numbers("num_heads")
        return {**values, "depths": depths, "heads": heads, "mlp_ratio": read_ratio(reader)}

    def _write(self) -> JsonDict:
        return {
            **super()._write(),
            "depths": list(self.depths),
            "num_heads": list(self.heads),
            "mlp_ratio": self.mlp_ratio,
        }
