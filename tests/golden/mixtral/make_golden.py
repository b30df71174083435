"""Makes the Mixtral checkpoints of this folder and what they give, with transformers and torch; tests need neither.

pip install torch transformers && python tests/golden/mixtral/make_golden.py
"""

import json
import pathlib

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

HERE = pathlib.Path(__file__).parent
PROMPT, NEW_TOKENS, LENGTH = 5, 20, 13
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
FOLDERS = {
    # Three query heads a key head, a head dim of its own, shards, the released names; 277 ids leave room for bytes.
    "gqa": {"vocab_size": 277, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6}
    | {"num_local_experts": 4, "num_experts_per_tok": 3, "eos_token_id": 0, "bos_token_id": 0},
    # One key head, the head tied to the embedding, one expert a token, bfloat16, the newer names; an older config.json.
    "mqa_tied": {"vocab_size": 61, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    | {"num_local_experts": 3, "num_experts_per_tok": 1, "rms_norm_eps": 1e-3},
}


def make_model(seed: int, sizes: dict) -> MixtralForCausalLM:
    """Random weights that make every part matter: larger than drawn, norms and gates away from where they begin."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**SIZES | sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(20 if ".gate." in name else 8)
    return model


def fused(tensors: dict, layers: int, experts: int) -> dict:
    """The same tensors under the names of newer checkpoints."""
    made = {name.replace("block_sparse_moe", "mlp"): a for name, a in tensors.items() if ".experts." not in name}
    for layer in range(layers):
        old = f"model.layers.{layer}.block_sparse_moe.experts"
        new = f"model.layers.{layer}.mlp.experts"
        w1, w2, w3 = ([tensors[f"{old}.{e}.w{n}.weight"] for e in range(experts)] for n in (1, 2, 3))
        made[f"{new}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        made[f"{new}.down_proj"] = torch.stack(w2)
    return made


def write_golden(folder: pathlib.Path, seed: int) -> None:
    """Logits of random rows and what follows their first tokens, in float32."""
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")  # the grouped product needs sizes of a multiple of four
    model.generation_config.eos_token_id = None
    drawn = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, model.config.vocab_size, (2, LENGTH), generator=drawn)
    with torch.no_grad():
        logits = model(tokens).logits.numpy()
        greedy = model.generate(tokens[:, :PROMPT], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    np.savez_compressed(folder / "golden.npz", tokens=tokens.numpy(), logits=logits, greedy=greedy.numpy())


def main() -> None:
    """Writes every folder anew."""
    for seed, (name, sizes) in enumerate(FOLDERS.items()):
        folder, model = HERE / name, make_model(seed, sizes)
        if name == "gqa":
            model.save_pretrained(folder, max_shard_size="60KB")
        else:
            model.to(torch.bfloat16).save_pretrained(folder)
            file = folder / "model.safetensors"
            save_file(fused(load_file(file), 2, sizes["num_local_experts"]), file, metadata={"format": "pt"})
            config = json.loads((folder / "config.json").read_text())
            config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_golden(folder, seed)


if __name__ == "__main__":
    main()
