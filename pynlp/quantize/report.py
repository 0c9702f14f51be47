"""What a quantization of a model cost: errors and bytes, layer by layer."""

from pathlib import Path
from typing import NamedTuple


class QuantizedLayer(NamedTuple):
    """A layer that was quantized.

    Attributes:
        name: In the model.
        shape: The weight's, `(out_features, in_features)`.
        error: Root mean square of the weight's error over that of the weight; NaN on the meta device.
        sqnr: The ratio of signal to quantization noise, `-20 log10(error)`, in dB.
        bytes_before, bytes_after: Those of the weight, and of its codes and scales.

    Example:
        >>> from pynlp.quantize import QuantizedLayer
        >>> QuantizedLayer("head", (10, 64), 0.1, 20.0, 2560, 360).bytes_before
        2560
    """

    name: str
    shape: tuple[int, int]
    error: float
    sqnr: float
    bytes_before: int
    bytes_after: int


class Report(NamedTuple):
    """What `quantize_` did; a table when printed.

    Attributes:
        how: The quantization.
        layers: Those that were quantized.
        skipped: Why other linear layers were not, by name.
        model_before, model_after: Bytes of all of the model's parameters and buffers.

    Example:
        >>> import torch
        >>> from pynlp.quantize import quantize_
        >>> report = quantize_(torch.nn.Sequential(torch.nn.Linear(64, 64)), "int8")
        >>> report.bytes_before, report.bytes_after
        (16384, 4352)
        >>> print(str(report).splitlines()[0])
        int8: 1 layer, 0.02 MB before, 0.00 MB after (26.6 %)
    """

    how: str
    layers: tuple[QuantizedLayer, ...]
    skipped: dict[str, str]
    model_before: int
    model_after: int

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights that were quantized."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of their codes and scales."""
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        share = f" ({self.bytes_after / self.bytes_before:.1%})".replace("%", " %") if self.bytes_before else ""
        lines = [
            f"{self.how}: {len(self.layers)} layer{'s' * (len(self.layers) != 1)}, {self.bytes_before / 1e6:.2f} MB "
            f"before, {self.bytes_after / 1e6:.2f} MB after{share}",
            f"the whole model: {self.model_before / 1e6:.2f} MB before, {self.model_after / 1e6:.2f} MB after",
        ]
        width = max([5, *(len(name) for name in [layer.name for layer in self.layers] + list(self.skipped))])
        if self.layers:
            lines.append(
                f"{'layer':{width}}  {'shape':>14}  {'error':>8}  {'SQNR dB':>7}  {'before':>10}  {'after':>10}"
            )
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            lines.append(
                f"{layer.name:{width}}  {shape:>14}  {layer.error:8.4f}  {layer.sqnr:7.1f}  {layer.bytes_before:10}  "
                f"{layer.bytes_after:10}"
            )
        lines += [f"{name:{width}}  kept: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Writes a picture of each layer's error; needs matplotlib.

        Args:
            path: Of the file, whose suffix says which kind: .png, .svg, .pdf.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.2 + 0.18 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        axes.barh([layer.name for layer in self.layers], [layer.error for layer in self.layers], color="#4477aa")
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel("relative error of the weight (root mean square)")
        axes.set_title(f"{self.how}: {self.bytes_before / 1e6:.1f} MB to {self.bytes_after / 1e6:.1f} MB")
        figure.savefig(path, dpi=120)
