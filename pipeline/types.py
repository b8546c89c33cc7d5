"""The values that flow through the pipeline. No logic.

Shape letters, used in comments here and as suffixes of local tensors everywhere:
B images of one grid, N visual tokens of an image, K tokens kept, D feature width, H heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

SIGNALS: Mapping[str, str] = {
    "cls_attention": "(B, N) attention of the class token to each visual token, mean over heads",
    "received_attention": "(B, N) mean attention a visual token receives from all visual tokens",
    "shallow_attention": "(B, N) cls_attention of an early tower layer; received, without a class",
    "last_cls_attention": "(B, N) cls_attention of the last tower layer, heads joined to one",
    "cls_logits": "(B, N) the last tower layer's class attention before softmax, mean over heads",
    "keys": "(B, N, D') key vectors of the attention of the selected tower layer, heads joined",
    "mean_keys": "(B, N, D') the same key vectors, mean over heads",
    "shallow_keys": "(B, N, D') key vectors of the layer of shallow_attention, heads joined",
    "last_keys": "(B, N, D') key vectors of the last tower layer, heads joined",
    "attention_output": "(B, N, D') output of the attention of the selected tower layer",
    "attention_flow": "(B, N, L, 3) class attention, value similarity to the class, value norm",
    "projector_sensitivity": "(B, N) root mean square gain of the projector at each token",
    "llm_hidden": "(B, N, D') hidden states after the first decoder layers, fixed prompt",
    "llm_attention": "(B, N) attention of the last prompt token in those layers, mean over heads",
}
"""Every signal an encoder may give and a carver may need; all are float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image of a shard, still encoded."""

    key: str  # unique within its shard
    image: bytes  # encoded file
    suffix: str  # of the image member, lower case, without the dot
    columns: Mapping[str, bytes] = field(default_factory=dict)  # other members, by suffix


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedSample:
    """One sample that could not be used, as it goes to `errors.parquet`."""

    key: str
    stage: str  # source, decode, encode
    reason: str  # short stable code
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRef:
    """One input shard as a listing shows it."""

    url: str
    size: int  # bytes
    etag: str  # changes when the content does; "" where the store gives none


@dataclass(frozen=True, kw_only=True, slots=True)
class TileLayout:
    """How the views of a tiled image lie: a thumbnail of all of it first, then tiles row by row."""

    rows: int  # of tiles
    columns: int  # of tiles
    unpadded: tuple[int, int, int, int]  # top, bottom, left, right: half-open, in tokens of the
    # canvas that the tiles make; tokens outside see padding only
    canvas: tuple[int, int] | None = None  # rows, columns of tokens that the unpadded canvas was
    # resampled to; the tokens are then those of the thumbnail, and these, and fill no grid


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualTokens:
    """The tokens of B images, or clips, that share one grid and layout."""

    features: Tensor  # (B, N, D) any float dtype
    grid: tuple[int, int]  # rows, columns of one view; num_views * rows * columns == N
    signals: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (B, N) or (B, N, *) f32
    image_indices: tuple[int, ...] | None = None  # place of each image in the encoder's input
    num_views: int = 1  # frames of a clip, or views of a tiled image, one after the other
    tiles: TileLayout | None = None  # num_views == 1 + tiles.rows * tiles.columns


@dataclass(frozen=True, kw_only=True, slots=True)
class CarvedTokens:
    """The tokens of one image that survive."""

    features: Tensor  # (K, D) dtype and device of the input
    positions: Tensor  # (K,) int64, ascending, unique, in [0, N): where each token came from
    sizes: Tensor  # (K,) float32 >= 1: how many source tokens it stands for
    ranks: Tensor  # (K,) int64, a permutation of 0..K-1: 0 is the token to keep if only one may


Placement = Literal["packed", "original", "weighted"]
"""Where kept tokens stand in a prompt, and what each counts for.

`packed`: one behind the other, as in any prompt: what every engine can do. `original`: each at the
position that it had among all tokens of its image, and the text behind the image where it would
stand behind all of them. `weighted`: like `original`, and a token that stands for s source tokens
is attended to as s equal tokens would be: log s is added to its attention scores (proportional
attention; Bolya et al., Token Merging, arXiv 2210.09461, section 3). For LLaVA-1.5-7B at 64 of 576
tokens merged by RESTORE on HoloV's selection, 8 sets, its authors report (arXiv 2606.01711) 93.5 %
of full tokens' scores packed, 90.1 at original positions, and 95.3 there with this term.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTokens:
    """Tokens of one image as a codec stores them, token by token: any prefix can be unpacked."""

    tokens: bytes | memoryview  # the codes, num_tokens * codec.token_bytes(D)
    aux: bytes | memoryview  # what it needs beside them, num_tokens * codec.aux_bytes
    num_tokens: int  # K
    head: bytes = b""  # what every prefix of the tokens needs (a scale per channel, say)
