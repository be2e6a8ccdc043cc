"""Secrets are hidden in every text that holds a URL, and foreign text has no effect where it is shown."""

import pytest

from vqscale.text import markdown, printable, printable_lines, redact_url


@pytest.mark.parametrize(
    "text, expected",
    [
        ("https://host/a.tar", "https://host/a.tar"),
        ("https://host:8080/a/b@v1/c.tar", "https://host:8080/a/b@v1/c.tar"),
        ("https://host/a.tar?sig=SECRET", "https://host/a.tar?sig=***"),
        ("https://host/a.tar?se=1&sig=SECRET&x", "https://host/a.tar?se=***&sig=***&***"),
        ("https://host/a.tar?SECRET", "https://host/a.tar?***"),
        ("https://host/a.tar?&sig=SECRET", "https://host/a.tar?***&sig=***"),
        ("https://host/a.tar#token=SECRET", "https://host/a.tar#token=***"),
        ("https://host/a b.tar?sig=SECRET SECRET", "https://host/a b.tar?sig=***"),
        ("https://host/a.tar?sig=it'sSECRET", "https://host/a.tar?sig=***"),
        ("https://host/{00..07}.tar?sig=SECRET", "https://host/{00..07}.tar?sig=***"),
        ("https://user:SECRET@host/a.tar", "https://***@host/a.tar"),
        ("https://SECRET@host/a.tar?sig=SECRET", "https://***@host/a.tar?sig=***"),
        ("https://user:SEC@RET@host/a.tar", "https://***@host/a.tar"),
        ("https://user:SEC/RET@host/a.tar", "https://***@host/a.tar"),
        ("https://user:SEC RET@host/a.tar", "https://***@host/a.tar"),
        ("s3://key:SECRET@bucket/a.tar", "s3://***@bucket/a.tar"),
        ("source=https://host/a.tar?sig=SECRET", "source=https://host/a.tar?sig=***"),
        ("pipe:curl https://user:SECRET@host/a.tar?sig=SECRET", "pipe:curl https://***@host/a.tar?sig=***"),
        ("pipe:curl -u me:SECRET https://h/a.tar", "pipe:curl -u *** https://h/a.tar"),
        ("pipe:curl --user=me:SECRET http://h", "pipe:curl --user=*** http://h"),
        ("pipe:curl -H 'Authorization: Bearer SECRET' http://h", "pipe:curl -H 'Authorization: Bearer ***' http://h"),
        ("pipe:AWS_SECRET_ACCESS_KEY=SECRET aws s3 cp", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp"),
        ("https://h/{a?s=SECRET,b?s=SECRET}.tar", "https://h/{a?s=***"),
        ("tokenizer=sha256:12 password: none", "tokenizer=sha256:12 password: none"),
        ("https://host/a?sig=SECRET: timed out (attempt 2)", "https://host/a?sig=***: timed out (attempt 2)"),
        ("https://h/a?s=SECRET, https://h/b?s=SECRET", "https://h/a?s=***, https://h/b?s=***"),
        ("a\nhttps://h/a?s=SECRET\nb", "a\nhttps://h/a?s=***\nb"),
        (
            "no control characters in '/a b?sig=SECRET' (found ' ')",
            "no control characters in '/a b?sig=***' (found ' ')",
        ),
        ("unknown key wrkers; did you mean workers?", "unknown key wrkers; did you mean workers?"),
        ("https://host: failed. Again?", "https://host: failed. Again?"),
        ("https://host/a: 404 for me@work", "https://host/a: 404 for me@work"),
        ("", ""),
    ],
)
def test_secrets_of_urls_are_hidden(text: str, expected: str) -> None:
    assert redact_url(text) == expected
    assert redact_url(expected) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("plain Ärger 猫 👩\u200d🔬", "plain Ärger 猫 👩\u200d🔬"),
        ("a\nINFO forged", r"a\nINFO forged"),
        ("\x1b[31mred\x07\r\t", r"\x1b[31mred\x07\r\t"),
        ("\u009b2J", r"\x9b2J"),
        ("gpj.\u202efdp", r"gpj.\u202efdp"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_nothing_acts_on_a_terminal(text: str, expected: str) -> None:
    assert printable(text) == expected
    expected.encode()


def test_lines_stay_lines() -> None:
    assert printable_lines("a: 1\n\tb\x00\n\n") == "a: 1\n\\tb\\x00\n\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("tabby cat, 0.5 (no. 3)", "tabby cat, 0.5 (no. 3)"),
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("![x](http://h/p.png)", r"\!\[x\](http:\//h/p.png)"),
        ("a|b", r"a\|b"),
        ("a_b *c* `d` &amp; $e$", r"a\_b \*c\* \`d\` \&amp; \$e\$"),
        ("# a", r"\# a"),
        ("- a", r"\- a"),
        ("1. a", r"1\. a"),
        ("www.evil.org", r"www\.evil.org"),
        ("@someone", r"\@someone"),
        ("a\n\n---\nb", r"a\\n\\n---\\nb"),
    ],
)
def test_nothing_acts_in_markdown(text: str, expected: str) -> None:
    assert markdown(text).replace("\\\\", "\\") == expected.replace("\\\\", "\\")
