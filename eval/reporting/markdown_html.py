"""`html_of`: the Markdown that our reports are written in, as HTML: headings, tables, lists, code, bold, links."""

from __future__ import annotations

import html
import re


def html_of(markdown: str, level: int = 3) -> str:
    """The text as HTML; what looks like HTML in it is shown as it is.

    Args:
        level: of its largest heading.
    """
    found, lines = [], markdown.splitlines()
    while lines:
        line = lines.pop(0)
        if not line.strip():
            continue
        heading = re.match(r"(#+) (.*)", line)
        if line.startswith("```"):
            code = []
            while lines and not lines[0].startswith("```"):
                code.append(lines.pop(0))
            lines[:1] = []
            found.append(f"<pre>{html.escape(chr(10).join(code))}</pre>")
        elif heading:
            depth = min(level + len(heading[1]) - 1, 6)
            found.append(f"<h{depth}>{_words(heading[2])}</h{depth}>")
        elif line.startswith("|"):
            found.append(_table([line, *_taken(lines, r"\|")]))
        elif re.match(r"[-*] ", line):
            items = [line, *_taken(lines, r"[-*] |  ")]
            points = re.split(r"\n(?=[-*] )", "\n".join(items))
            found.append("<ul>" + "".join(f"<li>{_words(' '.join(one[2:].split()))}</li>" for one in points) + "</ul>")
        else:
            text = " ".join([line, *_taken(lines, r"(?!#|\||```|[-*] )\S")])
            found.append(f"<p>{_words(text)}</p>")
    return "\n".join(found)


def _taken(lines: list[str], pattern: str) -> list[str]:
    """The first lines that begin as `pattern`, taken out of `lines`."""
    found = []
    while lines and re.match(pattern, lines[0]):
        found.append(lines.pop(0))
    return found


def _table(lines: list[str]) -> str:
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    has_head = len(rows) > 1 and all(re.fullmatch(r":?-+:?", cell) for cell in rows[1])
    head, body = (rows[0], rows[2:]) if has_head else ([], rows)
    top = f"<thead><tr>{''.join(f'<th>{_words(cell)}</th>' for cell in head)}</tr></thead>" if any(head) else ""
    cells = "".join(f"<tr>{''.join(f'<td>{_words(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f'<div class="wide"><table>{top}<tbody>{cells}</tbody></table></div>'


def _words(text: str) -> str:
    """Code, bold and links of one line."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        f"<code>{html.escape(one[1:-1])}</code>" if one[:1] == "`" and len(one) > 2 else _plain(one) for one in parts
    )


def _plain(text: str) -> str:
    shown = html.escape(text, quote=False).replace("\\|", "|")
    shown = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", shown)
    # Where a link leads is not part of the page.
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", shown)
