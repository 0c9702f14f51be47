"""`python -m pynlp` prints what this installation runs on, and why."""

from pynlp import info


def _lines(value, indent: str = "") -> list[str]:
    lines = []
    for key, entry in value.items():
        if isinstance(entry, dict):
            lines += [f"{indent}{key}:", *_lines(entry, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {', '.join(entry) if isinstance(entry, list) else entry}")
    return lines


if __name__ == "__main__":
    print("\n".join(_lines(info())))
