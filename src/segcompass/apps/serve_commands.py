"""``segcompass serve``: the web page."""

from __future__ import annotations

from typing import Annotated

import typer

from segcompass.apps.options import Device, Dtype, Model, Revision, load

app = typer.Typer()


@app.command()
def serve(
    model: Model = "nano",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")
    ] = None,
    upload_mb: Annotated[int, typer.Option(min=1, help="Largest picture file, in MB.")] = 20,
    waiting: Annotated[int, typer.Option(min=1, help="Questions that may wait.")] = 16,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one answer.")] = 120.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; default: the model's.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Open a web page: ask, watch the thought, explore the concepts and change them."""
    from segcompass.apps.web import run

    run(
        load(model, device, dtype, revision),
        host=host,
        port=port,
        upload_mb=upload_mb,
        waiting=waiting,
        timeout=timeout,
        max_new_tokens=max_new_tokens,
    )
