"""What a run shows while it goes: a bar, and a line every so many steps."""

import sys

from tqdm import tqdm


def progress(done: int, steps: int, rank: int):
    return tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True,
                disable=rank != 0 or not sys.stderr.isatty())


def show(bar, line: dict, print_it: bool) -> None:
    """Moves the bar by a step and, where asked, prints the step's means."""
    text = f"loss {line['loss']:.4f}{summary(line)}  {line['perf/tokens_per_second']:,.0f} tokens/s"
    bar.update()
    bar.set_postfix_str(text, refresh=False)
    if print_it:
        bar.write(f"step {line['step']:>5}  {text}")


def summary(means: dict, prefix: str = "") -> str:
    names = ("rewards/margins", "rewards/accuracies") if "rewards/margins" in means else ("logps_per_token/chosen",)
    return "".join(f"  {prefix}{name} {means[name]:.4f}" for name in names)
