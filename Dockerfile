# docker build -t llama_rlhf . && docker run --rm --gpus all --shm-size=1g -v /models:/models -v $PWD/runs:/app/runs llama_rlhf \
#     torchrun --nproc_per_node 8 solver_train.py --ckpt_dir /models/Llama-2-7b-hf --save_dir runs/solver
#
# torch from PyPI brings its CUDA libraries along; the host needs the driver and the NVIDIA container toolkit. On a machine without a GPU:
# docker build --build-arg INDEX=https://download.pytorch.org/whl/cpu -t llama_rlhf .
FROM python:3.11-slim

ARG INDEX=https://pypi.org/simple
WORKDIR /app

# first what seldom changes, so that a change of the code does not fetch it again
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --index-url "$INDEX" "$(grep '^torch==' constraints.txt)"

COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[gguf,parquet,report]'

# collectives on a CPU use /dev/shm, of which a container has 64 MB unless --shm-size says otherwise
CMD ["python", "solver_train.py", "--help"]
