"""trackio's page of the runs on this machine."""

from __future__ import annotations

import io
import os
import threading
import webbrowser
from contextlib import redirect_stdout, suppress

from sft_pipeline.utils.errors import SFTError

PLOT_ORDER = (
    "train/loss,train/tokens_per_second,eval/loss,eval/stop_rate,eval/loop_rate,eval/instructions_followed_rate"
)
NO_SMOOTHING = "smoothing=0"  # the page's own smoothing makes a flat line of a few points


def serve_dashboard(project: str, port: int | None, open_browser: bool) -> None:
    """Serve the page until it is interrupted."""
    try:
        import trackio
    except ImportError as error:
        raise SFTError('dashboard: trackio is not installed; pip install -e ".[track]"') from error
    try:
        found = len(trackio.Api().runs(project))
    except ValueError:  # no such project
        found = 0
    if not found:
        raise SFTError(f"dashboard: no runs of project {project} here; train with --report_to trackio, or name another")
    os.environ.setdefault("TRACKIO_PLOT_ORDER", PLOT_ORDER)
    # What trackio prints is coloured for any output, and holds the address that may delete runs.
    with redirect_stdout(io.StringIO()):
        server, address, _, private = trackio.show(project, open_browser=False, block_thread=False, server_port=port)
    print(f"{address.rstrip('/')}/?project={project}&{NO_SMOOTHING} (Ctrl-C ends it)", flush=True)
    if open_browser:
        webbrowser.open(f"{private}&{NO_SMOOTHING}")
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    server.close()
