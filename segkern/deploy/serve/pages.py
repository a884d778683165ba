"""Pages for a browser: one to drop a picture on, and the reference of the paths.

Both load nothing from elsewhere; their policy lets no other script or style run than their own.
"""

import base64
import hashlib
import re
from html import escape
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

_PAGE = Path(__file__).with_name("page.html")
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
_STYLE = """
:root { color-scheme: light dark; --ink: #1b2130; --dim: #5c667a; --paper: #fff; --card: #f5f7fb;
  --line: #dde3ec; --accent: #2f5fe0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf4; --dim: #98a3b8; --paper: #10141c;
  --card: #181e29; --line: #2b3444; --accent: #8fb0ff; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
a { color: var(--accent); } h1 { margin: 0; } .dim { color: var(--dim); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1rem 1.25rem; margin-top: 1rem; }
h2 { font-size: 1.05rem; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 b { color: var(--accent); margin-right: .5rem; } p { margin: .3rem 0 .7rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td { border-top: 1px solid var(--line); padding: .35rem .75rem .35rem 0; vertical-align: top; }
td:first-child { width: 8rem; font-family: ui-monospace, monospace; }
"""


def policy_of(page: str) -> str:
    """The Content-Security-Policy of a page: its inline script and style by their hashes, pictures
    that it holds itself, and requests to its own server."""
    found = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        found[kind].append(f"'sha256-{digest}'")
    rules = {f"{kind}-src": " ".join(hashes) or "'none'" for kind, hashes in found.items()}
    rules = {"default-src": "'none'", **rules, "img-src": "blob: data:", "connect-src": "'self'"}
    rules |= {"base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"}
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def add_pages(app: FastAPI) -> None:
    """Adds / and /docs to an application."""
    page = _PAGE.read_text(encoding="utf-8")

    def answer(text: str) -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy_of(text)})

    @app.get("/", include_in_schema=False)
    async def browser() -> HTMLResponse:
        return answer(page)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return answer(reference(app.openapi()))


def reference(schema: dict) -> str:
    """A page of the paths in an OpenAPI schema."""
    info, parts = schema["info"], []
    for path, methods in schema["paths"].items():
        for method, one in methods.items():
            text = "".join(
                f"<p>{escape(one[k])}</p>" for k in ("summary", "description") if k in one
            )
            body = one.get("requestBody", {}).get("content", {})
            rows = [("body", " or ".join(body))] if body else []
            rows += [(f"?{p['name']}", _about(p)) for p in one.get("parameters", ())]
            rows += [
                (status, x.get("description", ""))
                for status, x in one["responses"].items()
                if x.get("description")
                and "schema" not in str(x).lower().partition("validation")[0]
            ]
            cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
            head = f"<h2><b>{method.upper()}</b>{escape(path)}</h2>"
            parts.append(f"<section>{head}{text}<table>{cells}</table></section>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])}: paths</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(info['title'])}</h1><p class='dim'>{escape(info['description'])} "
        f"Version {escape(info['version'])}. The same for programs: "
        f"<a href='openapi.json'>openapi.json</a>.</p>{''.join(parts)}</main></body></html>\n"
    )


def _about(parameter: dict) -> str:
    """What a parameter may be, in a line."""
    schema = parameter["schema"]
    kinds = schema.get("anyOf", [schema])
    rules = [", ".join(map(str, x["enum"])) for x in kinds if "enum" in x]
    for x in kinds:
        if "minimum" in x:
            rules.append(f"{x['type']}, {x['minimum']:g} to {x['maximum']:g}")
    text = parameter.get("description") or schema.get("description", "")
    return f"{'; '.join(rules)}. {text}"
