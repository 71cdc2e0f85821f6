"""A ladder in words, tables and a figure; and what it says of a size that nobody trained."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipeline import paths
from pipeline.config import Config, load
from pipeline.diagnostics.forecast import duration, size
from pipeline.drawing import figures
from pipeline.errors import ConfigError
from pipeline.ladders import ladder
from pipeline.ladders.ladder import Found, Trained
from pipeline.ladders.plan import Ladder, Rung, flops_per_token, parameters, sized
from pipeline.ladders.registered import Forecast, Outcome
from pipeline.ladders.scaling_law import INSIDE, Band, beyond
from pipeline.tables import cell, markdown
from pipeline.tracking.mlflow_run import attach

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

PLACE = Path("comparisons/ladder")
FAR = 4.0  # times the largest rung, from which on a forecast is called a far one
UNSURE = 0.5  # of the smallest loss: a range of E as wide says that the points do not tell it
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "min": 60.0, "h": 3600.0}
_ASKED = re.compile(r"([^:]+):(\d+(?:\.\d+)?)(k|M|B|min|h|)")


def planned(asked: Ladder, known: Sequence[Trained], registering: bool) -> str:
    """What is about to be run, and how long that takes here."""
    missing = [ladder.possible(rung, known) for rung in ladder.collect(asked, known)[1]]
    own = [] if registering or ladder.matches(asked.next, known) else [asked.next]
    seconds = ladder.seconds_of([*missing, *own])
    now = {rung.name: rung for rung in missing}
    rows = [
        (rung.name, rung.parameters, rung.tokens, rung.steps - rung.begins, _of(rung, seconds))
        for rung in (now.get(one.name, one) for one in [*asked, asked.next])
    ]
    whole_again = [one.name for one in asked if now.get(one.name, one).parent != one.parent]
    columns = ("training", "parameters", "tokens", "steps of its own", "about")
    count, whole = len(list(asked)), duration(sum(seconds.values()))
    states = ladder.state_bytes(missing)
    kept = f", and {size(states)} of states to fork from" if states else ""
    return (
        f"{count} trainings and the forecast one, {count - len(missing)} of the {count} finished; "
        f"the rest takes about {whole} here{kept}\n\n"
        f"{markdown(columns, rows)}{_from_scratch(whole_again)}"
    )


def _from_scratch(names: Sequence[str]) -> str:
    if not names:
        return ""
    return (
        f"\n{', '.join(names)}: from the first step, as the long run of that size is done and kept "
        "no state where this one begins to cool down."
    )


def _of(rung: Rung, seconds: dict[str, float]) -> str:
    return duration(seconds[rung.name]) if rung.name in seconds else "-"


# --- the law


def points(found: Found) -> str:
    """A Markdown table of the rungs beside the law."""
    columns = ("training", "size", "parameters", "tokens", "loss", "law", "difference")
    rows = []
    for one in found.done:
        law = found.fit.law(one.point.parameters, one.point.tokens)
        of = one.name, one.rung.size, one.point.parameters, one.point.tokens
        rows.append((*of, f"{one.loss:.3f}", f"{law:.3f}", f"{one.loss - law:+.3f}"))
    return markdown(columns, rows)


def law_words(found: Found) -> str:
    """The law, how well it fits, and what of it these points do not tell."""
    fit = found.fit
    low, high = fit.spread("e")
    least = min(point.loss for point in fit.points)
    ranges = [
        f"{name} [{a:.2f}, {b:.2f}]" for name in ("alpha", "beta") for a, b in [fit.spread(name)]
    ]
    said = [
        f"{fit.law.words()}, nats/token; N are all parameters, D the tokens trained on.",
        f"The rungs lie beside it by {fit.residual:.2g} nats/token (root mean square)"
        + (f"; seeds have a std of {found.noise:.2g}." if found.noise else "."),
        f"{INSIDE:.0%} of {len(fit.draws)} bootstrap draws have E in [{low:.2f}, {high:.2f}], "
        f"{', '.join(ranges)}.",
    ]
    if high - low > UNSURE * least:
        said.append("These points do not tell E, the loss of endless training, from the rest.")
    if repeated := _repeated(found):
        said.append(repeated)
    return "\n".join(said)


def forecast_words(forecast: Forecast) -> str:
    """The forecast on record; its rungs may be others than those of the ladder asked for now."""
    _, points = forecast.fitted()
    n, d = beyond(points, forecast.parameters, forecast.tokens)
    when = datetime.fromtimestamp(forecast.time / 1000, UTC)
    return (
        f"{forecast.name}, on record since {when:%Y-%m-%d %H:%M} UTC, made of {len(points)} rungs: "
        f"{forecast.parameters:,} parameters, {forecast.tokens:,} tokens ({n:.2g} and {d:.2g} "
        f"times the largest rung): {forecast.band.words()} nats/token"
    )


# --- a question


def answer(asked: str, found: Found, changes: Sequence[str]) -> str:
    """What the law says of "SIZE:TOKENS" or "SIZE:HOURS", and of the same hours on the last rung.

    Raises ConfigError for anything else.
    """
    match = _ASKED.fullmatch(asked)
    if not match or not float(match[2]):
        raise ConfigError(
            f"--ask {asked}: expected SIZE:TOKENS or SIZE:TIME, as 124m:2.5B or 124m:3h"
        )
    base = load(paths.root() / paths.PARAMS, changes)
    asked_for = sized(base, match[1])
    count = parameters(asked_for)
    rate, largest = _rate(asked_for, found), found.largest
    amount, timed = float(match[2]) * UNITS[match[3]], match[3] in ("h", "min")
    tokens = amount * rate if timed else amount
    seconds = tokens / rate
    band = found.fit.at(count, tokens)
    same = seconds * largest.tokens_per_second
    other = found.fit.at(largest.rung.parameters, same)
    compared = (
        f"The same time on {largest.rung.size} is {same:,.0f} tokens, and {other.words()}: "
        f"{_better(band, other, match[1], largest.rung.size)}."
    )
    said = [
        f"{match[1]}: {count:,} parameters; {tokens:,.0f} tokens take about {duration(seconds)} "
        f"here, {cell(float(f'{rate:.3g}'))} tokens/s by the FLOP/s of {largest.rung.size}.",
        f"Expected is {band.words()} nats/token.",
        *_reach(count, tokens, found),
        *([] if count == largest.rung.parameters else [compared]),
        *_epochs({match[1]: tokens, largest.rung.size: same}, found),
    ]
    return "\n".join(said)


def _rate(asked: Config, found: Found) -> float:
    """Tokens/s of a size, if it computes as many FLOP/s as the largest rung did."""
    each = [flops_per_token(one) for one in (found.largest.rung.config, asked)]
    return found.largest.tokens_per_second * each[0] / each[1]


def _reach(count: int, tokens: float, found: Found) -> Iterator[str]:
    n, d = found.fit.beyond(count, tokens)
    yield f"That is {n:,.2g} times the parameters and {d:,.2g} times the tokens of any rung."
    if max(n, d) > FAR:
        yield (
            "So far out the band holds only if the law does: it knows the noise of these rungs, "
            "and not where the law bends, nor a better learning rate for that size."
        )


def _better(band: Band, other: Band, name: str, rung: str) -> str:
    if band.high < other.low:
        return f"{name} is worth the time"
    if band.low > other.high:
        return f"{name} is not worth the time, {rung} is ahead"
    return "these rungs do not tell which is ahead"


def _epochs(trained: dict[str, float], found: Found) -> Iterator[str]:
    corpus, repeated = found.largest.corpus, _repeated(found)
    once = (
        " The rungs saw each token once; a repeated one is worth less, which the law does not know."
    )
    for name, tokens in trained.items():
        if corpus and tokens > corpus:
            said = f"For {name} that is {tokens / corpus:,.1f} times the corpus."
            yield f"{said}{'' if repeated else once}"
    if repeated:
        yield repeated


def _repeated(found: Found) -> str:
    """That rungs saw tokens again, which bends the law; "" where none did."""
    times = max((one.rung.tokens / one.corpus for one in found.done if one.corpus), default=0.0)
    if times <= 1:
        return ""
    return (
        f"The rungs saw up to {times:,.1f} times the corpus: a repeated token is worth less, "
        "so the law is one of length and repetition, and says less of another corpus or length."
    )


# --- the whole


def conclude(found: Found) -> None:
    """Everything to the log, and to a folder with the figure."""
    said = [points(found), law_words(found)]
    if found.forecast:
        said.append(f"Forecast {forecast_words(found.forecast)}")
    if found.outcome:
        said.append(f"Outcome: {found.outcome.words()}")
    text = "\n\n".join(part.strip() for part in said)
    log.info("\n%s", text)
    folder = paths.root() / PLACE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ladder.md").write_text(f"# A ladder\n\n{text}\n", "utf-8")
    if found.forecast:
        drawn = figures.ladder(*lines(found.forecast), found.forecast, found.outcome)
        figures.save(drawn, folder / "ladder.png")
        log.info("figure: %s", folder / "ladder.png")
    if found.outcome:
        attach([found.outcome.record], folder, "ladder")


def lines(forecast: Forecast) -> tuple[dict[str, figures.Points], dict[str, figures.Points]]:
    """By size the (tokens, loss) of the rungs that a forecast is made of, and of the law there."""
    law, _ = forecast.fitted()
    seen: dict[str, figures.Points] = {}
    size_of: dict[str, int] = {}
    for point in forecast.points:
        seen[point["size"]] = [*seen.get(point["size"], ()), (point["tokens"], point["loss"])]
        size_of[point["size"]] = point["parameters"]
    span = [tokens for tokens, *_ in forecast.curve]
    fitted: dict[str, figures.Points]
    fitted = {name: [(d, law(count, d)) for d in span] for name, count in size_of.items()}
    return {name: sorted(found) for name, found in seen.items()}, fitted


def section(known: Iterable[tuple[Forecast, Outcome | None]]) -> list[dict[str, Any]]:
    """What the report shows of each forecast: words, and a figure as SVG with words for it."""
    return [
        {
            "name": forecast.name,
            "words": outcome.words() if outcome else f"{forecast.band.words()}; not run yet.",
            "alt": f"Loss by tokens of {len(forecast.points)} rungs, the law and the forecast.",
            "image": _svg(figures.ladder(*lines(forecast), forecast, outcome)),
        }
        for forecast, outcome in known
    ]


def _svg(figure: Figure) -> Markup:
    text = figures.svg(figure).decode()
    # An id may stand in a page once, and nobody asks for these.
    return Markup(re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :]))
