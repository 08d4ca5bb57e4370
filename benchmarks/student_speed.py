"""DyMN and MN, inference and a training step, against plain implementations of the same networks.

    python benchmarks/student_speed.py
    python benchmarks/student_speed.py --students dymn04 mn04 --batches 1 8 --threads 1
    python benchmarks/student_speed.py --device cuda --precision bf16 --compile

"Plain" is how the networks are usually written: every convolution of DyMN, 1×1 ones as well, as a grouped convolution whose
groups are those of all clips, Dy-ReLU with an axis of maps, batch norms as they stand; MN as convolutions in PyTorch's default
memory format. Both have the same weights and the script checks first that they give the same. They run in turns, so that
a busy machine slows both; a ratio is that of the medians. Clips of ten seconds (128 mels × 1000 frames).
With ``--profile`` it prints where the time goes instead, in ours.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from students import create_student
from students.families.dymn import DynamicBlock, DynamicConv, DynamicReLU
from students.interface import Student, StudentOutput

NUM_CLASSES = 527
FRAMES = 1000


# --- The plain implementations -----------------------------------------------------------------------------------------


class PlainStudent(nn.Module):
    """A student's own layers, called in the plain way; the weights are shared with it."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, mel: Tensor) -> StudentOutput:
        """(B, 1, n_mels, frames) -> logits (B, K), embedding (B, E)"""
        x = mel
        for layer in self.student.chain():
            x = plain_dynamic_block(layer, x) if isinstance(layer, DynamicBlock) else plain_layer(layer, x)
        return StudentOutput(self.student.classifier(x), x.mean((2, 3)))


def plain_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of MN with its convolutions one after the other, in whatever memory format the map has."""
    if isinstance(layer, nn.Sequential):
        for one in layer:
            x = plain_layer(one, x)
        return x
    if hasattr(layer, "has_residual"):
        return x + plain_layer(layer.block, x) if layer.has_residual else plain_layer(layer.block, x)
    return layer(x)


def plain_dynamic_block(block: DynamicBlock, x: Tensor) -> Tensor:
    inputs = x
    generation, (frequencies, times) = block.context_gen, x.shape[2:]
    pooled = torch.cat((x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)), dim=2)
    sequences = functional.hardswish(generation.joint_norm(generation.joint_conv(pooled)))  # (B, H, F + T, 1)
    context = sequences.mean((2, 3))
    frequency, time_sequence = sequences.split((frequencies, times), dim=2)
    time_sequence = time_sequence.permute(0, 1, 3, 2)
    if generation.stride > 1:
        frequency = functional.avg_pool2d(frequency, (3, 1), (2, 1), (1, 0))
        time_sequence = functional.avg_pool2d(time_sequence, (1, 3), (1, 2), (0, 1))
    if block.exp_conv is not None:
        x = block.exp_act(block.exp_norm(plain_dynamic_convolution(block.exp_conv, x, context)))
    x = block.depth_norm(plain_dynamic_convolution(block.depth_conv, x, context))
    x = plain_dynamic_relu(block.depth_act, x, context)
    x = x * generation.conv_f(frequency).sigmoid() * generation.conv_t(time_sequence).sigmoid()
    x = block.proj_norm(plain_dynamic_convolution(block.proj_conv, x, context))
    return x + inputs if block.has_residual else x


def plain_dynamic_convolution(conv: DynamicConv, x: Tensor, context: Tensor) -> Tensor:
    batch, channels, frequencies, times = x.shape
    out_channels, in_channels, size, _ = conv.kernel_shape
    attention = (conv.residuals[0](context) / conv.temperature).softmax(1)  # (B, K)
    kernel = (attention[:, None, None] @ conv.weight).view(batch * out_channels, in_channels, size, size)
    out = functional.conv2d(
        x.reshape(1, batch * channels, frequencies, times),
        kernel,
        stride=conv.stride,
        padding=size // 2,
        groups=batch * (channels // in_channels),
    )
    return out.view(batch, out_channels, *out.shape[2:])


def plain_dynamic_relu(relu: DynamicReLU, x: Tensor, context: Tensor) -> Tensor:
    theta = (2 * relu.coef_net(context).sigmoid() - 1).view(*x.shape[:2], 1, 1, 2 * relu.maps)
    slopes, intercepts = (theta * relu.lambdas + relu.init_v).to(x.dtype).split(relu.maps, dim=-1)
    return (x[..., None] * slopes + intercepts).amax(-1)


# --- Measuring ---------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def medians(functions: Sequence[Callable[[], object]], turns: int, device: torch.device) -> list[float]:
    """Median seconds of each, measured in turns after two calls that do not count."""
    times = [[seconds(function, device) for function in functions] for _ in range(turns + 2)][2:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def training_step(student: nn.Module, mel: Tensor, targets: Tensor, precision: str) -> Callable[[], None]:
    """Forward, loss, backward and Adam."""
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = student(mel).logits
        functional.binary_cross_entropy_with_logits(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference(student: nn.Module, mel: Tensor, precision: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(mel.device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            return student(mel).logits

    return run


def settled(name: str, device: torch.device) -> Student:
    """A student whose batch norms know its maps: those of a fresh one fade to denormal numbers in evaluation mode."""
    torch.manual_seed(0)
    student = create_student(name, num_classes=NUM_CLASSES).to(device)
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.3
    with torch.no_grad():
        for seed in range(8):
            student.train()(clips(4, device, frames=100, seed=seed))
    for norm in norms:
        norm.momentum = 0.01
    return student


def clips(batch: int, device: torch.device, frames: int = FRAMES, seed: int = 0) -> Tensor:
    """Noise with a level, a spectrum and a course of its own per clip, (batch, 1, 128, frames)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 1, 128, frames), (batch, 1, 128, 1), (batch, 1, 1, frames), (batch, 1, 1, 1))
    return sum(torch.randn(shape, generator=generator) for shape in shapes).to(device)


def processor_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def check_same(ours: Student, plain: PlainStudent, device: torch.device) -> None:
    mel = clips(2, device)
    with torch.inference_mode():
        expected = plain.eval()(mel).logits
        for student in (ours.eval(), ours.fuse()):
            difference = (student(mel).logits - expected).abs().max() / expected.abs().max()
            assert difference < 1e-3, f"the implementations differ by {difference:.1e} of the largest logit"


def report(name: str, args: argparse.Namespace, device: torch.device) -> None:
    ours = settled(name, device)
    plain = PlainStudent(ours)
    check_same(ours, plain, device)
    fused = ours.fuse()
    compiled = torch.compile if args.compile else (lambda student: student)
    for batch in args.batches:
        mel, targets = clips(batch, device), torch.rand(batch, NUM_CLASSES, device=device)
        if "inference" in args.modes:
            ours.eval()
            runs = [
                inference(plain, mel, args.precision),
                inference(compiled(ours), mel, args.precision),
                inference(compiled(fused), mel, args.precision),
            ]
            plain_time, our_time, fused_time = medians(runs, args.turns, device)
            print(
                f"| {name} | inference | {batch} | {1e3 * plain_time:.1f} | {1e3 * our_time:.1f} ({plain_time / our_time:.2f}×)"
                f" | {1e3 * fused_time:.1f} ({plain_time / fused_time:.2f}×) |",
                flush=True,
            )
        if "training" in args.modes:
            ours.train()
            our_mel = mel.contiguous(memory_format=torch.channels_last)
            runs = [
                training_step(plain, mel, targets, args.precision),
                training_step(compiled(ours), our_mel, targets, args.precision),
            ]
            plain_time, our_time = medians(runs, args.turns, device)
            print(
                f"| {name} | training | {batch} | {1e3 * plain_time:.1f} | {1e3 * our_time:.1f}"
                f" ({plain_time / our_time:.2f}×) | |",
                flush=True,
            )


def profile(name: str, args: argparse.Namespace, device: torch.device) -> None:
    ours = settled(name, device)
    for batch in args.batches:
        mel, targets = clips(batch, device), torch.rand(batch, NUM_CLASSES, device=device)
        for mode in args.modes:
            ours.train(mode == "training")
            run = (
                training_step(ours, mel, targets, args.precision)
                if mode == "training"
                else inference(ours, mel, args.precision)
            )
            run()
            with torch.profiler.profile() as profiler:
                run()
            print(f"{name}, {mode}, batch {batch}")
            sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
            print(profiler.key_averages().table(sort_by=sort_by, row_limit=15, max_name_column_width=45), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["dymn10", "mn10"], help="DyMN and MN, by name")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="clips at a time")
    parser.add_argument("--modes", nargs="+", choices=["inference", "training"], default=["inference", "training"])
    parser.add_argument("--turns", type=int, default=7, help="times each is measured")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is autocast")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile; the plain ones stay eager")
    parser.add_argument("--profile", action="store_true", help="where the time goes in ours")
    args = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(
        f"{processor_name(device)}, {args.threads} threads, torch {torch.__version__}, {args.precision};"
        f" median of {args.turns} turns"
    )
    if args.profile:
        for name in args.students:
            profile(name, args, device)
        return 0
    print("| student | | batch | plain, ms | ours, ms | folded, ms |")
    print("|---|---|---|---|---|---|")
    for name in args.students:
        report(name, args, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
