"""A rollout's answers as one HTML page without anything outside of it: what was said, how surely, what it earned."""

import html
import math
from collections.abc import Sequence
from string import Template

import numpy as np

from ringbpt.data.page import shown
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.rollout.engine import Sample

PROMPTS, TOKENS = 8, 2000  # of a rollout, and the last of a prompt and the first of an answer, that are shown

TEMPLATE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ringbpt: rollout $number</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
.note { color: GrayText; font-size: .85rem; margin: .2rem 0; }
.text { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem; margin: .3rem 0; }
.answer { display: grid; grid-template-columns: 9rem 1fr; gap: .7rem; align-items: start; }
.text b { font-weight: normal; border-radius: 2px; padding: 1px 0; }
.text i { opacity: .6; } meter { width: 100%; }
</style></head>
<body><h1>Rollout $number</h1><p class="note">$about</p>
<p class="note">The redder a token, the less likely it was to be drawn; slanted is what an environment has said. Point
at a token for its id and probability.</p>
$prompts
</body></html>
""")


def page(
    number: int, tokenizer: Tokenizer, prompts: Sequence[np.ndarray], samples: list[list[Sample]], reward_PR: np.ndarray
) -> str:
    """The first prompts with all their answers, the best first. reward_PR: NaN where one has failed."""
    known = reward_PR[np.isfinite(reward_PR)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    parts = []
    for p, (prompt, answers) in enumerate(zip(prompts[:PROMPTS], samples, strict=False)):
        text = html.escape("".join(shown(tokenizer, int(token)) for token in prompt[-TOKENS:]))
        parts.append(f'<h2>prompt of {len(prompt):,} tokens</h2><div class="text">{text}</div>')
        for r in np.argsort(-np.nan_to_num(reward_PR[p], nan=-np.inf), kind="stable").tolist():
            worth = float(reward_PR[p, r])
            bar = f'<meter min="{low}" max="{high}" value="{worth}"></meter>' if math.isfinite(worth) else ""
            told = f"reward {worth:.3f}" if math.isfinite(worth) else "its reward has failed"
            length, finish = len(answers[r].tokens), answers[r].finish
            note = f'<div class="note">{told}<br>{length:,} tokens, {finish}{bar}</div>'
            parts.append(f'<div class="answer">{note}<div class="text">{_tokens(tokenizer, answers[r])}</div></div>')
    mean = f"{known.mean():.3f}" if known.size else "none"
    about = f"{len(prompts)} prompts, {reward_PR.size} answers; mean reward {mean}"
    return TEMPLATE.substitute(number=number, about=about, prompts="\n".join(parts))


def _tokens(tokenizer: Tokenizer, sample: Sample) -> str:
    found = []
    for token, logp, drawn in list(zip(sample.tokens, sample.logps, sample.mask, strict=True))[:TOKENS]:
        text = html.escape(shown(tokenizer, token))
        if drawn:
            share = math.exp(min(logp, 0.0))
            style = f' style="background: hsl(5 80% 55% / {0.6 * (1 - share):.2f})"'
            found.append(f'<b{style} title="id {token}, probability {share:.3g}">{text}</b>')
        else:
            found.append(f'<i title="id {token}, not sampled">{text}</i>')
    return "".join(found)
