"""A chain of single blocks is the model."""

from pathlib import Path

import pytest
import torch

from checkpoints import write_checkpoint
from tulle.models.anatomy import ARCHITECTURES
from tulle.models.checkpoint import Checkpoint
from tulle.models.skeleton import Block, load_config

WINDOWED = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_blocks_in_a_row_give_the_models_hidden_states(tmp_path: Path, model_type: str, windowed: bool) -> None:
    settings = WINDOWED.get(model_type, {}) if windowed else {}
    if windowed and not settings:
        settings = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}
    write_checkpoint(tmp_path / "m", model_type, **settings)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tokens = torch.randint(0, 250, (2, 23), generator=torch.Generator().manual_seed(3))
    expected = model(tokens, output_hidden_states=True)

    checkpoint = Checkpoint.open(tmp_path / "m")
    anatomy, config = checkpoint.anatomy(), load_config(tmp_path / "m")
    hidden = model.get_input_embeddings()(tokens)
    for i in range(anatomy.layers):
        assert torch.equal(hidden, expected.hidden_states[i])
        hidden = Block(config, i, checkpoint.read_block(anatomy, i))(hidden)
    logits = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
