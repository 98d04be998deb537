"""A result in lines."""

from run import Result


def lines_of(result: Result, *, with_groups: bool) -> list[str]:
    """The cell, what it did in its watched steps, and the lines that asked for copies and reads."""
    watch = result.watch
    said = "ok" if result.error is None else f"{result.error} at {result.place}"
    kernels = ", ".join(f"{count} {name}" for name, count in sorted(watch.kernels.items())) or "none"
    lines = [f"{result.cell.name}: {said}", f"  {watch.num_operations} operations; attention kernels: {kernels}"]
    if with_groups:
        lines += [f"  {count:6} {group}" for group, count in watch.groups.most_common()]
    for (place, detail, blocks), count in watch.copies.most_common():
        lines.append(f"  copy {count}x {detail}{' BLOCKING' if blocks else ''} at {place}")
    for (place, name), count in watch.reads.most_common():
        lines.append(f"  read {count}x {name} at {place}")
    if result.tallies - {"cuda"}:
        lines.append(f"  metrics are added up on {sorted(result.tallies)}")
    return lines
