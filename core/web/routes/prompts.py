"""What do the words of a prompt mean to the model, which words are there, and what might one ask for?"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from flask import Flask, Response

from core.jobs.service import EngineService
from core.text import captions
from core.text.prompt_balancing import open_facets
from core.text.prompt_parser import read as read_prompt
from core.text.prompt_rewriting import unread_from, unread_in, unread_warning
from core.text.word_status import can_say, spoken_attributes
from core.web import queries, requests
from core.web import server_responses as responses
from core.web.aliases import both_names
from core.web.errors import json_response, tagged
from core.web.openapi import ETAG, IF_NONE_MATCH, JSON, UNCHANGED, Answer, operation
from core.web.validation import read_json, read_query, validate


def add_prompts(app: Flask, service: EngineService, words: Mapping[str, str], own: Sequence[str]) -> None:
    """What the model was trained to understand. How it rewrites a prompt is known only when it is loaded.

    `own` are captions that a person wrote, where the model learned from those.
    """
    spoken = spoken_attributes(words)

    @app.post("/prompt/analyze")
    @operation("What does the model understand of a prompt?", "prompts",
               {200: Answer("The analysis.", {JSON: responses.AnalysisAnswer})}, bodies={JSON: requests.AnalyzePrompt})
    def analyze() -> Response:
        """Positions count code points."""
        prompt = validate(requests.AnalyzePrompt, read_json()).prompt
        encoded_prompt, cut = prompt, len(prompt)
        if (info := service.info) is not None:
            encoded_prompt, cut = info.prompt_rewriting(prompt), unread_in(prompt, info)
            encoded_prompt = encoded_prompt[:unread_from(encoded_prompt, encoded_prompt, info.encoded_length)]
        found = read_prompt(prompt[:cut], words)
        unread = [replace(word, start=cut + word.start, end=cut + word.end, status="unread", suggestion=None)
                  for word in read_prompt(prompt[cut:], words).words]
        return json_response(both_names({
            "attributes": dict(found.attributes),
            "heard": encoded_prompt,
            "open": [facet.to_dict() for facet in open_facets(found.attributes, spoken)],
            "words": [asdict(word) for word in (*found.words, *unread)],
            "claims": [asdict(claim) for claim in found.claims],
            "contradictions": list(found.contradictions),
            "warnings": [*unread_warning("The prompt", prompt, cut), *found.warnings],
        }))

    @app.get("/vocabulary")
    @operation("The words that the model was trained on", "prompts",
               {200: Answer("Words, phrases and attributes.", {JSON: responses.VocabularyAnswer}, (ETAG,)),
                304: UNCHANGED},
               headers=(IF_NONE_MATCH,))
    def vocabulary() -> Response:
        """It changes only with the model."""
        return tagged(json_response({
            "words": dict(words),
            "phrases": [asdict(phrase) for phrase in captions.phrases() if can_say(phrase.text, words)],
            "attributes": [name for name in captions.ATTRIBUTES if name in spoken],
        }))

    @app.get("/prompt/surprise")
    @operation("A prompt like those of the training", "prompts",
               {200: Answer("The prompt.", {JSON: responses.SurpriseAnswer})}, query=queries.SurpriseQuery)
    def surprise() -> Response:
        """Drawn from how frequent each attribute is among the training images; or a caption that a person wrote."""
        seed = read_query(queries.SurpriseQuery).seed
        rng = random.Random(secrets.randbits(64) if seed is None else seed)
        return json_response({"prompt": rng.choice(own) if own else captions.surprise(rng)})
