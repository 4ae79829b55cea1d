"""Prices: do the last days say which way a share goes tomorrow, and how far it swings?

    python examples/prices.py [--quick] [--cell lstm]

Data: daily prices of Apple, Google, IBM and Microsoft from March 2000 (Google: August 2004) to March 2013, in
bokeh_sampledata (public domain: Quandl WIKI prices). Facebook's 196 days are too few and are left out.

Walk-forward: each test year has a network of its own, which has seen only the years before: the last of them chooses
the weights, all earlier ones train. It reads day by day and says two things of the next: up or down, and the logarithm
of the volatility (Garman and Klass, of the day's open, high, low and close). Beside it: always up and the day's own
sign; the day's own volatility, the mean so far, an autoregression, and HAR (Corsi 2009), a linear regression on the
means of 1, 5 and 22 days, and a linear regression on all that the network reads of a day, these three fitted on all
days before the test year. An interval counts days: four shares that fall together are one observation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from material import needed
from side_by_side import BACK, COLOURS, FAINT, INK, Options, Trained, evaluated, finish, options, parser, train
from torch import Tensor, nn
from torch.nn import functional as F

SHARES = ("AAPL", "GOOG", "IBM", "MSFT")
YEARS = range(2006, 2013)
LENGTH, BATCH, RATE = 128, 64, 2e-3
WARM = 22  # days that a training sequence reads before its predictions count
RUN_UP = 250  # days that are read before the first prediction of a year
DRAWN = ("AAPL", "2008-07-01", "2009-06-30")

# ------------------------------------------------------------------------------------------------------------- data


def prices() -> Any:
    """A DataFrame, a row a day: columns (open, AAPL) and so on. NaN before a share was traded."""
    stocks, pandas = needed("bokeh_sampledata.stocks", "pandas")
    frames = {share: pandas.DataFrame(getattr(stocks, share)).set_index("date") for share in SHARES}
    table = pandas.concat(frames, axis=1).swaplevel(axis=1)
    table.index = pandas.to_datetime(table.index)
    return table.sort_index().astype(float)


def returns(table: Any) -> Any:
    """Logarithmic, from close to close, adjusted for splits and dividends, [days, shares]."""
    (numpy,) = needed("numpy")
    return numpy.log(table["adj_close"]).diff()


def volatility(table: Any) -> Any:
    """The logarithm of Garman and Klass's daily volatility, [days, shares]. Ratios within a day know no splits."""
    (numpy,) = needed("numpy")
    swing, way = numpy.log(table["high"] / table["low"]), numpy.log(table["close"] / table["open"])
    return 0.5 * numpy.log(0.5 * swing**2 - (2 * math.log(2) - 1) * way**2)


def features(table: Any) -> Tensor:
    """[shares, days, features] of a day and the past alone: the share's own, and their mean over all shares.

    Return, the part of it from open to close, volatility and its means over 5 and 22 days, and turnover beside its
    mean of 22 days. NaN where one is not known yet.
    """
    (numpy,) = needed("numpy")
    swing = volatility(table)
    turnover = numpy.log(table["close"] * table["volume"])  # as money, it knows no splits
    own = [returns(table), numpy.log(table["close"] / table["open"]), swing]
    own += [swing.rolling(5).mean(), swing.rolling(22).mean(), turnover - turnover.rolling(22).mean()]
    values = torch.stack([torch.tensor(each.to_numpy(), dtype=torch.float32).T for each in own], dim=-1)
    return torch.cat([values, values.nanmean(dim=0, keepdim=True).expand_as(values)], dim=-1)


def standardised(x: Tensor, until: int) -> Tensor:
    """By mean and deviation of the days before `until`; what is not known becomes 0. At most 5 deviations."""
    before = x[:, :until].flatten(0, 1)
    mean = before.nanmean(dim=0)
    deviation = (before - mean).square().nanmean(dim=0).sqrt()
    return ((x - mean) / deviation).nan_to_num(0.0).clamp(-5, 5)


def check_no_leakage(table: Any, day: int) -> None:
    """Raises AssertionError if what the network reads until `day` changes when all later days come in reverse."""
    changed = table.copy()
    changed.iloc[day + 1 :] = table.iloc[day + 1 :].to_numpy()[::-1]
    one, other = (standardised(features(each), day + 1)[:, : day + 1] for each in (table, changed))
    if not torch.equal(one, other):
        raise AssertionError(f"features of day {day} or before it depend on later prices")


class Year:
    """What a test year's network reads, and when each part's days begin. A prediction belongs to the day it is of.

    x: [shares, days, features]; up: [shares, days], 1.0 or 0.0, NaN where the next day's return is zero or not known;
    swing: the next day's log volatility in deviations from the training days' mean, NaN where it is not known.
    """

    def __init__(self, table: Any, year: int) -> None:
        self.validation, self.test, self.end = (int((table.index.year < year + i).sum()) for i in (-1, 0, 1))
        check_no_leakage(table, self.validation)
        known = features(table)
        self.first = (~known.isnan().any(dim=-1)).int().argmax(dim=1)  # of each share the first day with all features
        self.x = standardised(known, self.validation)
        after = torch.tensor(returns(table).shift(-1).to_numpy().T, dtype=torch.float32)
        self.up = torch.where(after == 0, torch.nan, after.sign() / 2 + 0.5)
        swing = torch.tensor(volatility(table).shift(-1).to_numpy().T, dtype=torch.float32)
        training = swing[:, : self.validation - 1]
        self.mean = training.nanmean()
        self.deviation = (training - self.mean).square().nanmean().sqrt()
        self.swing = (swing - self.mean) / self.deviation

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences of the training days, at places of (seed, step) alone: x [B, T, D], up [B, T], swing [B, T]."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        room = (self.validation - 1 - LENGTH - self.first).clamp(min=0)  # places that a sequence may begin at
        share = torch.multinomial(room.float(), BATCH, replacement=True, generator=generator)
        start = self.first[share] + (torch.rand(BATCH, generator=generator) * room[share]).long()
        days = start[:, None] + torch.arange(LENGTH)
        return self.x[share[:, None], days], self.up[share[:, None], days], self.swing[share[:, None], days]


# ------------------------------------------------------------------------------------------------------------ model


class Forecaster(nn.Module):
    """Recurrent layer → of the next day the logit of a rise, and its volatility.

    rnn: torch.nn.GRU or fused_rnn.GRU, or any other class of that signature.
    forward: x [B, T, D] → both, each [B, T].
    """

    def __init__(self, rnn: type[nn.Module], features: int, hidden: int = 32) -> None:
        super().__init__()
        self.rnn = rnn(features, hidden, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.rnn(x)
        up, swing = self.head(self.dropout(y)).unbind(-1)
        return up, swing


def loss_of(said: tuple[Tensor, Tensor], up: Tensor, swing: Tensor) -> Tensor:
    """Cross-entropy of the direction in nats, and the squared error of the volatility; where a target is known."""
    rises, swings = ~up.isnan(), ~swing.isnan()
    cross = F.binary_cross_entropy_with_logits(said[0][rises], up[rises].to(said[0].dtype))
    return cross + (said[1][swings] - swing[swings]).square().mean()


def forecast(model: nn.Module, year: Year, begin: int, end: int, device: str) -> tuple[Tensor, Tensor]:
    """What the model says of the days begin to end, [shares, days] each, having read each time until the day before."""
    said = model(year.x[:, max(0, begin - 1 - RUN_UP) : end - 1].to(device))
    return tuple(each[:, begin - end :].cpu() for each in said)


# -------------------------------------------------------------------------------------------------------- baselines


def har(series: Any, test: int, end: int) -> Any:
    """One-day forecasts by means of 1, 5 and 22 days; fitted on the days before `test`."""
    numpy, models = needed("numpy", "sklearn.linear_model")
    means = [series.rolling(days).mean().shift(1).to_numpy() for days in (1, 5, 22)]
    inputs = numpy.stack(means, axis=1)[22:]
    fitted = models.LinearRegression().fit(inputs[: test - 22], series.to_numpy()[22:test])
    return fitted.predict(inputs[test - 22 : end - 22])


def autoregression(series: Any, test: int, end: int) -> Any:
    """One-day forecasts by an AR model, its order by AIC; fitted on the days before `test`."""
    (ar,) = needed("statsmodels.tsa.ar_model")
    values = series.to_numpy()
    lags = ar.ar_select_order(values[:test], maxlag=22, ic="aic").ar_lags or 0
    fitted = ar.AutoReg(values[:test], lags).fit()
    return fitted.apply(values[:end]).predict(test, end - 1)


def linear(year: Year) -> Tensor:
    """The network's own inputs of a day by one linear regression for all shares, fitted on the days before the test."""
    (models,) = needed("sklearn.linear_model")
    day = torch.arange(year.swing.shape[1])
    known = (day >= year.first[:, None]) & (day < year.test - 1) & ~year.swing.isnan()
    fitted = models.LinearRegression().fit(year.x[known].numpy(), year.swing[known].numpy())
    x = year.x[:, year.test - 1 : year.end - 1]
    return torch.from_numpy(fitted.predict(x.flatten(0, 1).numpy())).view(x.shape[:2]) * year.deviation + year.mean


def baselines(table: Any, test: int, end: int) -> dict[str, Tensor]:
    """Forecasts of the log volatility on the days test to end, [shares, days] each."""
    (numpy,) = needed("numpy")
    made: dict[str, list[Any]] = {"mean so far": [], "today's": [], "autoregression": [], "HAR": []}
    for share in SHARES:
        series = volatility(table)[share]
        begin = int(series.isna().sum())
        values, at, to = series.iloc[begin:], test - begin, end - begin
        made["mean so far"].append(values.expanding().mean().shift(1).to_numpy()[at:to])
        made["today's"].append(values.shift(1).to_numpy()[at:to])
        made["autoregression"].append(autoregression(values, at, to))
        made["HAR"].append(har(values, at, to))
    return {name: torch.from_numpy(numpy.stack(each)).float() for name, each in made.items()}


def over_days(values: Tensor) -> tuple[float, float, float, float]:
    """[days] → mean, its 95 % interval, p that it is zero; by Newey and West, as one day may resemble the last."""
    (numpy, api) = needed("numpy", "statsmodels.api")
    fitted = api.OLS(values.double().numpy(), numpy.ones(len(values))).fit(cov_type="HAC", cov_kwds={"maxlags": 5})
    low, high = fitted.conf_int()[0]
    return float(fitted.params[0]), float(low), float(high), float(fitted.pvalues[0])


# ------------------------------------------------------------------------------------------------------------- main


def walk(given: Options, table: Any, year: int) -> tuple[Trained, dict[str, Tensor]]:
    """Train the network of a year, and collect what is said of its days, [shares, days] each."""
    data = Year(table, year)

    def build(library: ModuleType) -> Forecaster:  # library: torch.nn or fused_rnn, the swap
        return Forecaster(given.layer(library), data.x.shape[-1])

    def loss(model: nn.Module, step: int, _: Any) -> tuple[Tensor, Any]:
        x, up, swing = (each.to(given.device) for each in data.batch(step, given.seed))
        said = [each[:, WARM:] for each in model(x)]
        return loss_of(said, up[:, WARM:], swing[:, WARM:]), None

    def score(model: nn.Module) -> float:
        said = forecast(model, data, data.validation, data.test, given.device)
        days = slice(data.validation - 1, data.test - 1)
        return loss_of(said, data.up[:, days], data.swing[:, days]).item()

    trained = train(given, build, loss, rate=RATE, decay=0.1, label=str(year), score=score, score_every=20)
    logit, swing = evaluated(lambda model: forecast(model, data, data.test, data.end, given.device), trained.model)
    days = slice(data.test - 1, data.end - 1)
    said = baselines(table, data.test, data.end) | {"network": swing * data.deviation + data.mean}
    said["linear, same inputs"] = linear(data)
    said["swing"] = data.swing[:, days] * data.deviation + data.mean
    moved = torch.tensor(returns(table).iloc[data.test - 1 : data.end - 1].to_numpy().T, dtype=torch.float32)
    said |= {"up": data.up[:, days], "says up": (logit > 0).float(), "rose": (moved > 0).float()}
    return trained, said


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("prices", __doc__, cell="gru", steps=400, quick_steps=40)
    given = options(made, arguments)
    needed("sklearn", "statsmodels", "pandas", "matplotlib", "bokeh_sampledata")
    table = prices()
    years = [2008] if given.quick else [*YEARS]
    walked = [walk(given, table, year) for year in years]
    trained = [each for each, _ in walked]
    said = {name: torch.cat([each[name] for _, each in walked], dim=1) for name in walked[0][1]}

    this, up = given.cell.upper(), said["up"]
    directions = {"always up": torch.ones_like(up), "today's sign": said["rose"], this: said["says up"]}
    right = {
        name: torch.where(up.isnan(), torch.nan, (each == up).float()).nanmean(0) for name, each in directions.items()
    }
    days = ~right[this].isnan()
    accuracy = {name: over_days(each[days]) for name, each in right.items()}
    error = {
        name: (said[name] - said["swing"]).square().mean(0)
        for name in ("mean so far", "today's", "autoregression", "HAR", "linear, same inputs")
    }
    rival = min(error, key=lambda name: error[name].mean())
    error[this] = (said["network"] - said["swing"]).square().mean(0)
    relative = {name: over_days(each / error["HAR"].mean()) for name, each in error.items()}

    best = max(("always up", "today's sign"), key=lambda name: accuracy[name][0])
    ahead, *_, chance = over_days(right[this][days] - right[best][days])
    found = "no better than" if chance > 0.05 or ahead <= 0 else f"{100 * ahead:.1f} points better than"
    direction = f"{found} {best} (p = {chance:.2g})"
    less, *_, chance = over_days((error[rival] - error[this]) / error[rival].mean())
    found = f"no better than {rival}" if chance > 0.05 or less <= 0 else f"error {100 * less:.1f} % below {rival}"
    swings = f"{found} (p = {chance:.2g})"
    print(f"\nDirection: {direction}.\nVolatility: {swings}.\n")

    quality: dict[str, Any] = {
        "in short": f"direction: {direction.partition(' (')[0]}; volatility: {swings.partition(' (')[0]}",
        "right direction, %": 100 * accuracy[this][0],
        "squared error, HAR's = 1": relative[this][0],
    }
    for name, (mean, low, high, _) in accuracy.items():
        quality[f"direction, {name}"] = f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    mean_error = error["mean so far"].mean()
    for name, each in error.items():
        quality[f"volatility, {name}"] = (
            f"{relative[name][0]:.3f} of HAR's error, R² {1 - (each.mean() / mean_error).item():.3f}"
        )
    quality |= {"direction": direction, "volatility": swings}

    def draw(figure: Any) -> None:
        from matplotlib import dates, ticker

        story, bars, points = figure.subplots(1, 3, width_ratios=(1.6, 1, 0.9))
        share, begin, end = DRAWN
        when = table.index[table.index.year.isin(years)]
        shown = (when >= begin) & (when <= end)
        lines = {"measured": ("swing", "#c8c8d4", 1.0), "HAR": ("HAR", BACK, 1.0), this: ("network", COLOURS[0], 1.8)}
        for name, (key, colour, width) in lines.items():
            daily = 100 * math.sqrt(252) * said[key][SHARES.index(share)].exp()
            story.plot(when[shown], daily[torch.from_numpy(shown)], color=colour, linewidth=width, label=name)
        story.set(yscale="log", title=f"{share}'s volatility, as foretold a day before", ylabel="% a year")
        story.yaxis.set_major_formatter("{x:g}")
        story.yaxis.set_minor_formatter(ticker.NullFormatter())
        story.set_yticks([10, 20, 50, 100, 200])
        story.xaxis.set_major_formatter(dates.ConciseDateFormatter(story.xaxis.get_major_locator()))
        story.set_ylim(top=300)
        story.legend(ncols=3, loc="upper right")
        names = [*relative]
        bars.barh(
            names, [relative[name][0] for name in names], color=[COLOURS[0] if n == this else "#c8c8d4" for n in names]
        )
        bars.bar_label(bars.containers[0], fmt=" %.2f")
        bars.invert_yaxis()
        bars.set(
            title=f"Volatility:\n{swings.partition(' (')[0]}",
            xlabel="squared error, HAR's = 1",
            xlim=(0, 1.2 * max(r[0] for r in relative.values())),
        )
        bars.grid(visible=False)
        for x, (name, (mean, low, high, _)) in enumerate(accuracy.items()):
            bounds = [[100 * (mean - low)], [100 * (high - mean)]]
            points.errorbar(x, 100 * mean, bounds, marker="o", capsize=4, color=COLOURS[0] if name == this else FAINT)
        points.axhline(50, color=INK, linewidth=0.8, linestyle=":")
        points.set_xticks(range(len(accuracy)), [name.replace(" ", "\n") for name in accuracy])
        points.set(
            title=f"Direction:\n{direction.partition(' (')[0]}",
            ylabel="right, %, with 95 % interval",
            xlim=(-0.5, len(accuracy) - 0.5),
        )
        points.grid(visible=False, axis="x")

    data = {"shares": ", ".join(SHARES), "days": len(table), "test years": f"{years[0]} to {years[-1]}"}
    data |= {
        "test days": len(up[0]),
        "forecasts": up.numel(),
        "returns of zero, without a direction": int(up.isnan().sum()),
    }
    return finish(given, trained, quality, data, draw)


if __name__ == "__main__":
    sys.exit(main())
