"""Text that others wrote, made safe for where it is shown.

In: names, paths, URLs and commands.  Out: the same without secrets, or escaped for a terminal, a log or Markdown.
(jinja2 escapes HTML.) Also errors that say where they come from.
"""

import contextlib
import re
import unicodedata
from collections.abc import Iterator

HIDDEN = "***"
# A password may hold what it must not: then the part after `user:` is no port, and all up to the next @ is hidden.
_USERINFO = re.compile(r"(?<=://)(?:[^\s/?#]*@|[^\s/?#@:]*:(?!\d*(?:[/?#]|$)|\s)[^\n]*?@)")
# Blanks belong to a query: where its end is in doubt, too much is hidden.
_QUERY = re.compile(
    r"(?P<before>://[^?\n]*\?(?=[^\s).,;'\"])|[?#](?=[\w.~%-]+=))(?P<query>.*?)(?=$|: |, | \(|[\"'](?!\w))",
    re.MULTILINE,
)
# In the command of a pipe: curl's options and headers, variables of the environment.
_CREDENTIAL = re.compile(
    r"((?:\b|_)(?:token|password|secret|api_?key|access_key)=|authorization: *\w+ +|\s(?:-u|--user)[ =])[^\s'\"&]+",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[\\`*_{}\[\]<>&|~$#!@]|(?<=:)/|(?<=www)\.|^[-+=]|(?<=^\d)[.)]")
_JOINERS = "\u200c\u200d"  # parts of emoji, and of words in several scripts


def redact_url(text: str) -> str:
    """The text with the user, the password and the query's values of each URL in it hidden, and a pipe's secrets."""
    text = _USERINFO.sub(f"{HIDDEN}@", text)
    text = _QUERY.sub(lambda match: match["before"] + _without_values(match["query"]), text)
    return _CREDENTIAL.sub(rf"\1{HIDDEN}", text)


def _without_values(query: str) -> str:
    pairs = (pair.partition("=") for pair in query.split("&"))
    return "&".join(f"{key}={HIDDEN}" if equals else HIDDEN for key, equals, _ in pairs)


def printable(text: str) -> str:
    """On one line, without effect on a terminal or a log: control, direction and broken characters as escapes."""
    return "".join(_escaped(character) for character in text)


def printable_lines(text: str) -> str:
    """The same for each line."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(message: object) -> str:
    """A message, an error's for instance, as one printable line without secrets."""
    return printable(redact_url(" ".join(str(message).split())))


@contextlib.contextmanager
def error_prefix(where: object) -> Iterator[None]:
    """Inside, the message of a ValueError gets `where` and a colon before it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _escaped(character: str) -> str:
    acts = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS
    return character.encode("unicode_escape").decode() if acts else character


def format_duration(seconds: float) -> str:
    """2:05:09 for hours, minutes and seconds; 3d 04h from a day on."""
    days, rest = divmod(int(seconds), 86_400)
    return f"{days}d {rest // 3600:02d}h" if days else f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def markdown(text: str) -> str:
    """As plain text in Markdown: no markup, HTML, link, table cell or line comes from it."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))
