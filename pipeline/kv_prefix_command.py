"""The command `carve kv-prefix`; `pipeline/cli.py` registers it."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml

from pipeline.carved_cache import open_cache
from pipeline.errors import ConfigError
from pipeline.types import Placement

if TYPE_CHECKING:
    from pipeline.consumers.kv_writer import PrefixSummary

_DTYPES = Literal["float32", "bfloat16", "float16"]


def kv_prefix(  # noqa: PLR0913  (one argument a flag)
    url: Annotated[str, typer.Argument(help="Of the cache.")],
    model: Annotated[str, typer.Option("--model", help="Directory or hub id of the checkpoint.")],
    prompt: Annotated[
        str, typer.Option("--prompt", help="What stands before every question, image included.")
    ],
    codec: Annotated[str, typer.Option("--codec", help="Of the keys and values.")] = "int8",
    codec_options: Annotated[
        list[str] | None, typer.Option("--codec-option", help="name=value; may be repeated.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the artefact; the codec's if not given.")
    ] = None,
    placement: Annotated[Placement, typer.Option("--placement", help="Of the tokens.")] = "packed",
    keep_tokens: Annotated[
        int | None, typer.Option("--keep-tokens", min=1, help="Per image; all if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="In images.")] = 8,
    device: Annotated[str, typer.Option("--device", help="Of the model.")] = "cpu",
    dtype: Annotated[_DTYPES, typer.Option("--dtype", help="Of the model.")] = "float32",
    revision: Annotated[
        str | None, typer.Option("--revision", help="Of a checkpoint on the hub.")
    ] = None,
) -> None:
    r"""Store what a language model remembers of every image of a cache: keys and values.

    Larger than the tokens themselves, often many times: docs/kv_prefix.md says when it pays. The
    prompt holds the image token once: "USER: <image>\n", say. Run again, it makes what is missing.
    """
    # Models take seconds to import, and every other command waited for them.
    import torch

    from pipeline.consumers.checkpoint import load_without_tower
    from pipeline.consumers.kv_writer import write_prefixes

    cache = open_cache(url, keep_tokens=keep_tokens)
    loaded, tokenizer = load_without_tower(
        model, revision=revision, dtype=getattr(torch, dtype), device=device
    )
    summary = write_prefixes(
        cache,
        loaded,
        tokenizer,
        prompt=prompt,
        codec=codec,
        codec_options=_options(codec_options or []),
        placement=placement,
        name=name,
        batch_size=batch_size,
    )
    for line in _lines(summary):
        typer.echo(line)


def _options(given: list[str]) -> dict[str, Any]:
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--codec-option {text!r}: expected name=value")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as err:
            raise ConfigError(f"--codec-option {text!r}: the value is no YAML") from err
    return options


def _lines(summary: "PrefixSummary") -> list[str]:
    todo = summary.num_shards - summary.num_done_before
    if not todo:
        return [f"nothing to do: all {summary.num_shards} shards are in {summary.url}"]
    lines = [
        f"{summary.url}: {todo} shards committed, {summary.num_done_before} done before, "
        f"{summary.num_images - summary.num_rejected} images written, "
        f"{summary.num_rejected} rejected"
    ]
    if summary.bytes_prefixes:
        lines.append(
            f"{summary.bytes_prefixes / 1e6:.2f} MB of prefixes for "
            f"{summary.bytes_embeddings / 1e6:.2f} MB of tokens: "
            f"{summary.bytes_prefixes / summary.bytes_embeddings:.1f} times as much"
        )
    return lines
