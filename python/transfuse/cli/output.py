"""What every command prints with: a table of text, a progress bar, and JSON that is written whole."""

import json
import shutil
import sys
import time


def table(headers, rows):
    """Columns padded to their widest entry; numbers (already formatted) are set right, words left."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(len(row[index]) for row in [headers, *cells]) for index in range(len(headers))]
    numeric = [
        bool(cells) and all(row[index][:1].isdigit() or row[index] in ("", "-") for row in cells)
        for index in range(len(headers))
    ]
    lines = []
    for row in [headers, *cells]:
        columns = zip(row, widths, numeric, strict=True)
        set_out = [value.rjust(width) if right else value.ljust(width) for value, width, right in columns]
        lines.append("  ".join(set_out).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def number(value):
    """A figure with three digits, a count as it is, "-" for none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) < 1e5 and value == int(value) else f"{value:.3g}"


class Progress:
    """One line on a terminal's stderr: what runs, how far, for how long. Silent elsewhere and under --quiet."""

    def __init__(self, total, quiet=False, stream=None):
        self.stream = stream or sys.stderr
        self.shown = not quiet and self.stream.isatty()
        self.total, self.done, self.start = total, 0, time.monotonic()

    def step(self, what):
        """Shows `what` as the work under way, one unit further."""
        if self.shown:
            width = shutil.get_terminal_size().columns - 1
            filled = 24 * self.done // max(self.total, 1)
            seconds = time.monotonic() - self.start
            line = f"[{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total} {seconds:4.0f} s  {what}"
            self.stream.write("\r" + line[:width].ljust(width))
            self.stream.flush()
        self.done += 1

    def close(self):
        """Clears the line, so that results start on a clean one."""
        if self.shown:
            self.stream.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
            self.stream.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def print_json(value):
    print(json.dumps(value, indent=1))
