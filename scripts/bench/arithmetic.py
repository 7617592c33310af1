"""What Llama-3.1-8B should cost on H100s, from shapes and the maker's figures alone.

python -m scripts.bench.arithmetic
"""

from scripts.bench.shapes import LLAMA_8B, RANK, Shapes, decode_bytes, step_flops

PEAK = 989e12  # FLOP/s, bf16, dense: H100 SXM's data sheet
MEMORY = 3.35e12  # bytes a second, the same
LINK = 450e9  # bytes a second and direction, NVLink 4, the same
DOCUMENT, TRAINED = 512, 0.7  # tokens; share of them that has a loss (about that of Alpaca's rows)
CHUNK = 256  # positions whose logits are held
NF4 = 4.127  # bits a weight, double-quantised


def activations(shapes: Shapes) -> int:
    """Returns the bytes that a block keeps of each token for its backward pass, in bf16.

    The inputs of both norms and what they return, q, k, v, the attention's output, and of the MLP gate and up; their
    SwiGLU is made again. A frozen product keeps nothing; LoRA's A needs the inputs that are in this list.
    """
    attention = (shapes.heads + 2 * shapes.kv_heads) * shapes.head_size
    return 2 * (4 * shapes.width + attention + shapes.heads * shapes.head_size + 2 * shapes.hidden)


def unpacking_seconds(shapes: Shapes, passes: int) -> float:
    """Returns the time to unpack all NF4 weights to bf16 so many times: read the codes, write the weights."""
    return passes * shapes.layers * shapes.block_parameters() * (NF4 / 8 + 2) / MEMORY


def main() -> None:
    shapes = LLAMA_8B
    blocks, embeddings = shapes.layers * shapes.block_parameters(), 2 * shapes.vocab * shapes.width
    flops = step_flops(shapes, [DOCUMENT], round(TRAINED * DOCUMENT), "lora") / DOCUMENT
    print(f"LoRA r {RANK}: {flops / 1e9:.2f} GFLOP a real token, {PEAK / flops:,.0f} tokens/s at the peak of one H100")
    for share in (0.4, 0.5, 0.6):
        print(f"  at {share:.0%} of it {share * PEAK / flops:,.0f} tokens/s, 8 of them {8 * share * PEAK / flops:,.0f}")
    print(f"  again forward for activation checkpointing: {flops / 1e9 + 2 * blocks / 1e9:.2f} GFLOP a token")
    for tokens in (2048, 8192, 16384):
        compute, unpack = tokens * flops / PEAK / 0.5, unpacking_seconds(shapes, 2)
        rates = [tokens / seconds for seconds in (compute + unpack, compute)]
        print(f"QLoRA, {tokens:,} tokens a forward pass: {rates[0]:,.0f} tokens/s where LoRA has {rates[1]:,.0f}")
        print(f"  (at half the peak; unpacking takes {1000 * unpack:.1f} ms of {1000 * (compute + unpack):.0f})")
    lora, chunk = shapes.lora_parameters(RANK), CHUNK * shapes.vocab * (2 + 4 + 4)
    print(f"memory, GB: weights in bf16 {2 * (blocks + embeddings) / 1e9:.2f}, or")
    print(f"  blocks in NF4 {blocks * NF4 / 8e9:.2f}, embedding and head in bf16 {2 * embeddings / 1e9:.2f}")
    print(f"  LoRA {lora:,} parameters x (4 + 4 + 8) bytes {16 * lora / 1e9:.2f}; chunk of logits {chunk / 1e9:.2f}")
    kept, inputs = activations(shapes), 2 * shapes.width
    again = kept + 2 * shapes.hidden  # of the one block that is computed again, whose SwiGLU is kept
    for tokens in (2048, 8192, 16384):
        whole, light = shapes.layers * kept * tokens, (shapes.layers * inputs + again) * tokens
        print(f"  activations of {tokens:,} tokens {whole / 1e9:.1f}; with activation checkpointing {light / 1e9:.2f}")
    ring, gather = 2 * 7 / 8 * 4 * lora / LINK, 7 / 8 * 2 * blocks / LINK
    hides = gather * 0.5 * PEAK / (flops / 2)  # half of a step's products are its forward pass
    print(f"8 devices, ddp: LoRA's gradients take {1000 * ring:.2f} ms a step")
    print(
        f"  fsdp: gathering the blocks takes {1000 * gather:.0f} ms, as long as the forward pass of {hides:,.0f} tokens"
    )
    for name, bits in (("bf16", 16), ("NF4", NF4)):
        read = decode_bytes(shapes, bits, 16, 512, 1)
        print(f"writing, one prompt, {name}: {read / 1e9:.2f} GB a token, at most {MEMORY / read:.0f} tokens/s")


if __name__ == "__main__":
    main()
