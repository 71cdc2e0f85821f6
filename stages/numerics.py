"""numerics: what the number formats are, and what they cost and bring on this very machine."""

from __future__ import annotations

import torch

from pipeline import paths
from pipeline.compute import runtime
from pipeline.compute.precision import PRECISIONS
from pipeline.config import Config
from pipeline.drawing import figures
from pipeline.storage.folders import remove
from pipeline.studies import loss_scaling, number_formats, op_dtypes, roofline, sensitivity
from pipeline.tables import write_csv, write_json
from pipeline.tracking import recording
from stages.common import run


def main(config: Config) -> None:
    with recording.record("numerics", config) as record:
        device = runtime.choose_device(config.device)
        record.tags({"numerics.device": runtime.device_name(device), "torch": torch.__version__})
        remove(paths.NUMERICS)
        known = number_formats.formats()
        suffered = sensitivity.sensitivities(device)
        shapes = roofline.shapes(
            config.model.n_embd,
            config.model.n_head,
            config.model.vocab_rows,
            config.train.batch_size,
            config.train.sequence_length,
        )
        measured = roofline.measure(shapes, device, runtime.device_name(device))
        write(known, suffered, measured)
        write_steps(device)
        metrics = summary(measured)
        record.metrics(metrics)
        # No metric of DVC's: all experiments of a machine share it, and it has many columns.
        write_json(paths.NUMERICS / "numerics.json", metrics)
        record.artifact(paths.NUMERICS, "numerics")
    show(measured, suffered)


def write(
    known: list[number_formats.Format],
    suffered: list[sensitivity.Sensitivity],
    measured: roofline.Roofline,
) -> None:
    """Tables to read, tables to compute with, and figures."""
    folder = paths.NUMERICS
    for name, rows in (("formats", known), ("sensitivity", suffered)):
        write_csv(folder / f"{name}.csv", list(vars(rows[0])), [vars(r).values() for r in rows])
    write_csv(folder / "products.csv", roofline.PRODUCT_COLUMNS, measured.product_rows())
    write_csv(folder / "operations.csv", roofline.OPERATION_COLUMNS, measured.operation_rows())
    pages = {
        "formats": number_formats.page(known),
        "sensitivity": sensitivity.page(suffered),
        "products": measured.products_page(),
        "operations": measured.operations_page(),
    }
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, "utf-8")
    figures.save(figures.bit_layout(known), folder / "formats.png")
    figures.save(figures.error_and_speed(measured), folder / "error_and_speed.png")
    figures.save(figures.roofline(measured), folder / "roofline.png")


def write_steps(device: torch.device) -> None:
    """What a real training step does: each operation's formats, and its loss scale in fp16."""
    folder = paths.NUMERICS
    watches = {name: op_dtypes.watched(name, device) for name in PRECISIONS}
    columns = ("precision", *op_dtypes.COLUMNS)
    rows = [(name, *cells) for name, watch in watches.items() for cells in watch.cells()]
    write_csv(folder / "dtypes.csv", columns, rows)
    for name, watch in watches.items():
        (folder / f"dtypes_{name}.md").write_text(watch.page(), "utf-8")
    shown = loss_scaling.demonstrate(device)
    (folder / "loss_scale.md").write_text(shown.page(), "utf-8")
    figures.save(figures.loss_scale(shown), folder / "loss_scale.png")


def summary(measured: roofline.Roofline) -> dict[str, float]:
    found = {"numerics/bandwidth_gb_per_second": measured.bandwidth / 1e9}
    for mode, (speed, error) in measured.speed_and_error().items():
        found |= {
            f"numerics/{mode}_gflops": measured.rates[mode] / 1e9,
            f"numerics/{mode}_speed": speed,
            f"numerics/{mode}_error": error,
        }
    if measured.mostly_calls:
        found["numerics/call_share"] = measured.call_share
        for mode, (speed, _) in measured.speed_and_error(reference=True).items():
            found[f"numerics/{mode}_speed_{roofline.REFERENCE.lower()}"] = speed
    return found


def show(measured: roofline.Roofline, suffered: list[sensitivity.Sensitivity]) -> None:
    """The figures that people ask for; the pages have the rest."""
    print(
        f"numerics: {measured.device}, {measured.bandwidth / 1e9:.1f} GB/s; the rate of one large "
        "product, and speed and error of the model's own"
    )
    # On a device that is idle most of the time, a column more.
    beside = measured.speed_and_error(reference=True) if measured.mostly_calls else {}
    head = f"{f'{roofline.REFERENCE}, of fp32':>15}" if beside else ""
    print(f"{'':<8}{'large product':>16}{'own, of fp32':>15}{'error':>10}{head}")
    for mode, (speed, error) in measured.speed_and_error().items():
        rate = f"{measured.rates[mode] / 1e9:,.0f} GFLOP/s"
        more = f"{beside[mode][0]:>15.2f}" if beside else ""
        print(f"{mode:<8}{rate:>16}{speed:>15.2f}{error:>10.1e}{more}")
    if beside:
        print(f"numerics: {measured.about_calls()}")
    amplified = ", ".join(
        f"{op} {value:.2f}" for op, value in sensitivity.amplifications(suffered).items()
    )
    print(f"rounding of operands, amplified: {amplified}")


if __name__ == "__main__":
    run(main, "numerics")
