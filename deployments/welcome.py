"""The page at ``/``."""

from __future__ import annotations

import html

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>flexpipe-serve</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem }}
pre {{ background: #f2f2f2; padding: 1rem; overflow-x: auto }}</style></head>
<body>
<h1>flexpipe-serve</h1>
<p>An OpenAI-compatible server. Try it:</p>
<pre>curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}], "stream": true}}'</pre>
<p>For the <code>openai</code> client, the base URL is <code>{url}/v1</code>.</p>
<p>Change the pipeline's split while it serves, and see what that did:</p>
<pre>curl {url}/flexpipe/refactor -d '{{"stages": 3}}'</pre>
<ul>
<li><a href="docs">The API, with a form to try it</a> (<a href="openapi.json">schema</a>)</li>
<li><a href="v1/models">The model</a></li>
<li><a href="flexpipe/status">The pipeline: layout, stages, memory, queue</a></li>
<li><a href="flexpipe/refactor">Refactorings</a>, <a href="flexpipe/events">events</a></li>
<li><a href="flexpipe/config">What changes without a restart</a></li>
<li><a href="health">Health</a>, <a href="metrics">metrics</a></li>
</ul>
</body></html>
"""


def welcome_page(*, base_url: str) -> str:
    """HTML with the first request to try; ``base_url`` as the browser sees the server."""
    return _PAGE.format(url=html.escape(base_url))
