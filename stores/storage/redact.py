"""Secrets out of texts: what comes from storage libraries is shown only after `redact`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import quote

HIDDEN = "***"

_SECRET_WORDS = {
    *("secret", "token", "password", "passwd", "passphrase", "credential", "credentials"),
    *("key", "sas", "signature", "sig", "auth", "authorization"),
}
_PUBLIC_NAMES = {"sse_kms_key_id", "sse_bucket_key_enabled"}  # names and switches of keys, not keys
_SHORTEST = 6  # characters; hiding a shorter value would hide ordinary words with it

_USER_INFO = re.compile(r"(?<=://)[^\s/?#'\"]*@")
_QUERY = re.compile(
    r"(?i)\b(x-amz-[a-z-]+|x-goog-[a-z-]+|awsaccesskeyid|googleaccessid|signature|credential|sig|"
    r"access_token|token|secret|password)=[^\s&,;'\"<>)]+"
)
# The body of an answer to a request that was signed with the wrong key repeats what was signed and with what.
_ELEMENT = re.compile(
    r"(?is)<(AWSAccessKeyId|SignatureProvided|StringToSign|StringToSignBytes|CanonicalRequest|CanonicalRequestBytes|"
    r"AuthenticationErrorDetail|Token)>.*?</\1>"
)
_ACCESS_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}\b")


def redact(text: str) -> str:
    """Returns a text without credentials. Mutates nothing.

    Hidden: values of environment variables whose names speak of keys, tokens, passwords or secrets (from 6 characters
    on), user names and passwords in URLs, signatures in queries, and what S3 repeats of a signed request.
    """
    for value in sorted(_secret_values(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    text = _QUERY.sub(rf"\1={HIDDEN}", text)
    text = _ELEMENT.sub(rf"<\1>{HIDDEN}</\1>", text)
    return _ACCESS_KEY_ID.sub(HIDDEN, text)


def is_secret_name(name: str) -> bool:
    """Returns whether an option or environment variable of this name holds a secret, as far as names can tell."""
    plain = name.lower().replace("-", "_")
    if any(plain.endswith(public) for public in _PUBLIC_NAMES):
        return False
    words = set(plain.split("_"))
    return bool(words & _SECRET_WORDS) or plain.endswith(("secret", "password", "apikey")) or "service_account" in plain


def has_credentials(url: str) -> bool:
    """Returns whether a URL carries a user name, a password, a query or a fragment: places where credentials hide."""
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]
    if scheme.lower() in ("http", "https"):
        host = re.sub(r":\d+$", "", host)
    return bool(set("@:") & set(host)) or bool(set("?#") & set(rest))


def _secret_values() -> Iterator[str]:
    for name, value in os.environ.items():
        # A path is where a secret lies, not the secret; to hide it would hide the cause of an error.
        if len(value) >= _SHORTEST and is_secret_name(name) and not os.path.isabs(value):
            yield value
            yield quote(value, safe="")
