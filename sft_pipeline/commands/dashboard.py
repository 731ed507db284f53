"""Serve trackio's dashboard of the runs on this machine."""

from __future__ import annotations

import io
import os
import threading
import webbrowser
from contextlib import redirect_stdout, suppress

from sft_pipeline.utils.errors import SFTError

PLOT_ORDER = (
    "train/loss,train/tokens_per_second,eval/loss,eval/stop_rate,eval/loop_rate,eval/tool_call_match_rate,"
    "eval/instructions_followed_rate"
)
NO_SMOOTHING = "smoothing=0"  # the page's default smoothing flattens a line of few points


def serve_dashboard(project: str, port: int | None, open_browser: bool) -> None:
    """Serve the page until Ctrl-C. Raises SFTError without trackio, or if the project has no runs."""
    try:
        import trackio
    except ImportError as error:
        raise SFTError('dashboard: trackio is not installed; pip install -e ".[track]"') from error
    try:
        run_count = len(trackio.Api().runs(project))
    except ValueError:  # no such project
        run_count = 0
    if not run_count:
        raise SFTError(
            f"dashboard: project {project} has no runs here; train with --report_to trackio, or name another project"
        )
    os.environ.setdefault("TRACKIO_PLOT_ORDER", PLOT_ORDER)
    # trackio's own output has colour codes even in a file, and an address with the token that may delete runs.
    with redirect_stdout(io.StringIO()):
        server, address, _, write_address = trackio.show(
            project, open_browser=False, block_thread=False, server_port=port
        )
    print(f"{address.rstrip('/')}/?project={project}&{NO_SMOOTHING} (Ctrl-C stops it)", flush=True)
    if open_browser:
        webbrowser.open(f"{write_address}&{NO_SMOOTHING}")
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    server.close()
