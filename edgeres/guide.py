"""What each command's help teaches: examples that work as they stand, exit codes of gates, and what comes next.

The embedded default is built by `edgeres build` alone, so most examples are about its bundle, ``build/digits-int8``.
"""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional, Tuple

import click
from click.shell_completion import ShellComplete, get_completion_class

from edgeres.answers import answered
from edgeres.exits import OK

DIGITS = "build/digits-int8"
SHELLS = ("bash", "zsh", "fish")


class Lesson(NamedTuple):
    """``examples`` are pairs of what is done and the line that does it; ``codes`` is what a gate's exit codes mean."""

    examples: Tuple[Tuple[str, str], ...]
    after: str
    codes: str = ""

    @property
    def epilog(self) -> str:
        """The text behind a command's options; click leaves paragraphs that begin with ``\\b`` as they are."""
        lines = [line for what, command in self.examples for line in (f"  # {what}", f"  {command}")]
        codes = [f"Exit codes: {self.codes}"] if self.codes else []
        return "\n\n".join(["\b\n" + "\n".join(["Examples:", *lines]), *codes, f"Next: {self.after}"])


LESSONS: Dict[str, Lesson] = {
    "build": Lesson(
        (
            ("the embedded default, handwritten digits, into build/digits-int8", "edgeres build --precision int8"),
            (
                "your own network",
                "edgeres build --model resnet50 --weights w.pth --calibration images/ --validation labelled/",
            ),
            ("a recipe, one of its settings changed", "edgeres build calibration/recipe.toml --max-drop 1"),
            ("whether the same comes out again", f"edgeres build --check --out {DIGITS}"),
        ),
        f"`edgeres report {DIGITS} --open` shows it; `edgeres pack {DIGITS}` makes one file to ship.",
        "0 good, 1 failed, or the verdict is fail; of several bundles, one of them. With --check: 1 not the same.",
    ),
    "export": Lesson(
        (
            ("the embedded default's FP32 model", "edgeres export"),
            ("a torchvision checkpoint", "edgeres export --model resnet18 --weights resnet18.pth --out build/net"),
        ),
        "`edgeres calibrate BUNDLE`.",
    ),
    "calibrate": Lesson(
        (
            ("the embedded default's ranges", "edgeres calibrate"),
            ("others, of the bundle that is there", f"edgeres calibrate {DIGITS} --method entropy"),
        ),
        "`edgeres quantize BUNDLE`; `edgeres inspect BUNDLE` shows the ranges.",
    ),
    "quantize": Lesson(
        (
            ("the embedded default's int8 model", "edgeres quantize"),
            ("with the classifier in float", f"edgeres quantize {DIGITS} --keep-float fc"),
        ),
        "`edgeres compile BUNDLE`, here or where it will run.",
    ),
    "compile": Lesson(
        (
            ("what can be compiled here", "edgeres compile --list-targets"),
            ("for this machine's CPU", f"edgeres compile {DIGITS} --target cpu"),
            ("on a Jetson, of a bundle from a host", "edgeres compile BUNDLE --target gpu"),
        ),
        "`edgeres validate BUNDLE` judges that engine; `edgeres bench BUNDLE` measures it.",
    ),
    "validate": Lesson(
        (
            ("the gate", f"edgeres validate {DIGITS}"),
            ("in CI, with a limit on the latency", f"edgeres validate {DIGITS} --junit gate.xml --max-latency-ms 20"),
            ("on other samples, by another budget", "edgeres validate BUNDLE --validation labelled/ --max-drop 1"),
        ),
        f"`edgeres inspect {DIGITS}` says which layers cost most, `edgeres report {DIGITS} --open` shows which answers "
        "changed.",
        "0 passes, 1 fails, 3 open: so few samples, or no labels.",
    ),
    "bench": Lesson(
        (
            ("against its float twin", f"edgeres bench {DIGITS}"),
            ("with preprocessing, one frame at a time", f"edgeres bench {DIGITS} --frames 480x640 --batch 1"),
            ("kept, for the bundle's page", f"edgeres bench {DIGITS} --out {DIGITS}.bench.json"),
        ),
        f"`edgeres report {DIGITS}` takes a kept one into the page; `edgeres validate --max-latency-ms` is the gate.",
    ),
    "report": Lesson(
        (
            ("make it anew and look at it", f"edgeres report {DIGITS} --open"),
            ("elsewhere, the bundle untouched", f"edgeres report {DIGITS} --out page.html"),
        ),
        "`edgeres sign BUNDLE --key PRIVATE`: a page within the bundle is bound by its manifest, and so changes it.",
    ),
    "diff": Lesson(
        (
            ("two bundles of one network", f"edgeres diff {DIGITS} build/digits-fp16"),
            ("all of it, for a program", f"edgeres diff {DIGITS} build/digits-fp16 --json"),
        ),
        "`edgeres validate BUNDLE --baseline REPORT.json` is the gate against an engine that was accepted.",
    ),
    "inspect": Lesson(
        (
            ("a bundle: each layer, and why", f"edgeres inspect {DIGITS}"),
            ("any ONNX file, and what TensorRT would refuse of it", f"edgeres inspect {DIGITS}/model.int8.onnx"),
            ("its bill of materials", f"edgeres inspect {DIGITS} --sbom"),
        ),
        "`edgeres build BUNDLE --keep-float MODULE` leaves a layer that costs too much in float.",
    ),
    "verify": Lesson(
        (
            ("is it as it was built?", f"edgeres verify {DIGITS}"),
            ("and by whom you trust?", "edgeres verify BUNDLE --key lab.key.pub"),
            ("before it is unpacked", "edgeres verify net.edgeres --key lab.key.pub"),
        ),
        "`edgeres compile BUNDLE`, where no engine fits this machine.",
        "0 as it was built (with --key: signed by it), 1 not.",
    ),
    "keygen": Lesson(
        (
            ("a pair: lab.key stays here, lab.key.pub goes to robots", "edgeres keygen lab.key"),
            ("locked by a passphrase", "edgeres keygen release.key --passphrase"),
        ),
        "`edgeres sign BUNDLE --key FILE`.",
    ),
    "sign": Lesson(
        (
            ("check all of it, and sign", f"edgeres sign {DIGITS} --key lab.key"),
            ("by a second key, while keys are changed", f"edgeres sign {DIGITS} --key next.key"),
        ),
        "`edgeres pack BUNDLE`; on the robot `edgeres unpack FILE --key PUBLIC`.",
    ),
    "pack": Lesson(
        (
            ("into build/digits-int8.edgeres", f"edgeres pack {DIGITS}"),
            ("one that I signed, and nothing else", "edgeres pack BUNDLE --key lab.key.pub -o net.edgeres"),
        ),
        "copy the file, then there `edgeres unpack FILE`.",
    ),
    "unpack": Lesson(
        (
            ("into ./digits-int8", f"edgeres unpack {DIGITS}.edgeres"),
            (
                "what the lab signed alone, over the one before",
                "edgeres unpack net.edgeres --key lab.key.pub --out net",
            ),
        ),
        "`edgeres compile FOLDER` makes the engine of a machine that has none; `edgeres.load(FOLDER)` runs it.",
    ),
    "init": Lesson(
        (
            ("a recipe and a workflow for GitHub, here", "edgeres init"),
            ("for GitLab, elsewhere", "edgeres init other/ --ci gitlab"),
        ),
        "`edgeres build calibration/recipe.toml`, which works as it stands; then edit that file.",
    ),
    "models": Lesson(
        (
            ("which networks there are", "edgeres models"),
            ("the same, for a program", "edgeres models --json"),
        ),
        "`edgeres build --model NAME --weights FILE --calibration FOLDER`.",
    ),
    "doctor": Lesson(
        (("what works here", "edgeres doctor"), ("for a program", "edgeres doctor --json")),
        "what it says to install; then `edgeres compile --list-targets`.",
    ),
    "completion": Lesson(
        (
            ("bash, in ~/.bashrc", 'eval "$(edgeres completion bash)"'),
            ("zsh, in ~/.zshrc", 'eval "$(edgeres completion zsh)"'),
            ("fish", "edgeres completion fish > ~/.config/fish/completions/edgeres.fish"),
        ),
        "`edgeres build --model <Tab>`, in a new shell.",
    ),
    "manual": Lesson(
        (
            ("read it", "edgeres manual | man -l -"),
            ("keep it, for `man edgeres`", "edgeres manual > ~/.local/share/man/man1/edgeres.1"),
        ),
        "`edgeres COMMAND --help`, which has the same of one command.",
    ),
}


class Taught(click.Group):
    """A group whose commands' help ends with what their lesson says."""

    def add_command(self, cmd: click.Command, name: Optional[str] = None) -> None:
        lesson = LESSONS.get(name or cmd.name or "")
        cmd.epilog = lesson.epilog if lesson is not None else cmd.epilog
        super().add_command(cmd, name)


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> int:
    """A script that lets a shell complete commands, options, models, targets and bundles.

    It asks edgeres itself at each Tab, which imports no tool that builds or runs networks.
    """
    root = context.find_root()
    kind = get_completion_class(shell)
    assert kind is not None
    # Its own source() would start a shell, only to look at the version.
    script = ShellComplete.source(kind(root.command, {}, "edgeres", "_EDGERES_COMPLETE"))
    with answered():
        click.echo(script)
    return OK


@click.command()
@click.pass_context
def manual(context: click.Context) -> int:
    """The man page, edgeres(1): all commands, their options and examples, as roff.

    It is written from what the commands are, so it is that of the installed version.
    """
    from edgeres.manual import page

    text = page(context.find_root())
    with answered():
        click.echo(text)
    return OK
