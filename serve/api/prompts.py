"""What may be asked about prompts, `/v1/prompts`: what one comes to, and how near several are to one another."""

from __future__ import annotations

from fastapi import APIRouter

from serve.api.analysis_schemas import AnalysisOrder, AnalysisReport, SimilarityOrder, SimilarityReport
from serve.api.auth import Embeds
from serve.api.errors import documented
from serve.api.parts import GUARDED, Text
from serve.text import NewText

router = APIRouter(prefix="/v1/prompts", tags=["text"], responses=documented(401, 403, 503), dependencies=GUARDED)


@router.post("/analyze", responses=documented(400, 404, 413, 415, 422))
async def analyze_prompt(order: AnalysisOrder, texts: Text, caller: Embeds) -> AnalysisReport:
    """Tokens, rows and weights for each encoder, what is cut, the texts of every step, the units and where they are
    kept, and advice. It costs no forward pass."""
    return AnalysisReport.of(await texts.analyze(NewText(**order.model_dump(by_alias=True), salt=caller.salt)))


@router.post("/similarity", responses=documented(400, 404, 413, 415, 422))
async def compare_prompts(order: SimilarityOrder, texts: Text, caller: Embeds) -> SimilarityReport:
    """The cosine of each two of 2 to 16 texts, by encoder. What is not in the cache is encoded."""
    found = await texts.similarity(order.prompts, order.model, order.encoder, caller.salt)
    return SimilarityReport(model=found.model, family=found.family, compared=found.compared)
