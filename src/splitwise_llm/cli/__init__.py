"""The command line: the only place that knows everything, and turns errors into a message and an exit code."""

from __future__ import annotations

import signal
import sys

from splitwise_llm.cli import (
    benches,
    constants,
    demo,
    follow,
    generate,
    live,
    low_level,
    machines,
    plan,
    profile,
    reproductions,
    scenarios,
    simulate,
    stability,
    survival,
    train,
    yardsticks,
)
from splitwise_llm.cli.options import app
from splitwise_llm.errors import SplitwiseError, UserError

__all__ = [
    "app",
    "benches",
    "constants",
    "demo",
    "follow",
    "generate",
    "live",
    "low_level",
    "machines",
    "main",
    "plan",
    "profile",
    "reproductions",
    "scenarios",
    "simulate",
    "stability",
    "survival",
    "train",
    "yardsticks",
]


def main() -> None:
    """Run the command line; errors of ours end in one line on stderr and their exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until something runs that must be ended in order
    try:
        app()
    except SplitwiseError as error:
        print(f"splitwise: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"splitwise: {error}; check the path, its permissions and the space left", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
