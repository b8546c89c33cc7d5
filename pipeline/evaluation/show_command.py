"""The command `carve show`; `pipeline/cli.py` registers it."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.evaluation.settings import parse_share
from pipeline.evaluation.show import Fit, show_images, show_row
from pipeline.evaluation.shown import ShownImage, check_output, write_shown

# Not used by what is shown, and so not asked for.
_NO_PLACE = "memory://carve-show"


def show(  # noqa: PLR0913  (one argument a flag)
    items: Annotated[
        list[str],
        typer.Argument(help="With --config: images. Without: a cache's URL and a key of it."),
    ],
    output: Annotated[Path, typer.Option("--output", help="File to write: .html or .png.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of a run; encodes the images anew.")
    ] = None,
    names: Annotated[
        str, typer.Option("--carvers", help="Names, with commas; the config's own if not given.")
    ] = "",
    keep: Annotated[
        str | None,
        typer.Option("--keep", help="Share of the tokens, such as 2/9, in place of the budget."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="The file a row was made from; of a clip, one a frame."),
    ] = None,
    fit: Annotated[
        Fit,
        typer.Option("--fit", help="How the image comes under the grid of a row, without a model."),
    ] = "model",
) -> None:
    """Draw which tokens were kept, merged and dropped, for one or more carvers side by side."""
    check_output(output)
    share = None if keep is None else parse_share(keep)
    shown = (
        _stored(items, names, image or [], share, fit)
        if config is None
        else _encoded(items, config, names, image or [], share)
    )
    write_shown(shown, output)
    typer.echo(f"{len(shown)} images drawn: {output}")


def _encoded(
    items: list[str], config: Path, names: str, image: list[str], keep: float | None
) -> list[ShownImage]:
    if image:
        raise ConfigError("--image goes with a cache; with --config give the images by themselves")
    run = load_config(config, input_shards=_NO_PLACE, output_url=_NO_PLACE)
    return show_images(run, items, names=[n for n in names.split(",") if n], keep=keep)


def _stored(
    items: list[str], names: str, image: list[str], keep: float | None, fit: Fit
) -> list[ShownImage]:
    if names:
        raise ConfigError("--carvers goes with --config; a row of a cache is carved already")
    if len(items) != 2 or not image:
        raise ConfigError(
            "give --config and images, or a cache's URL, one key and --image with the file"
        )
    url, key = items
    return [show_row(url, key, image, keep=keep, fit=fit)]
