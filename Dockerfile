# JupyterLab with the course. docker-compose.yml starts it next to a Redis.
FROM python:3.11-slim

# Some lessons start Redis servers of their own, to fill them and to break them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends redis-server \
    && rm -rf /var/lib/apt/lists/*

# Notebooks run any code, so not as root. 1000 is the first user of most Linux machines.
RUN useradd --uid 1000 --create-home learner \
    && install -d -o 1000 -g 1000 /home/learner/work

# The packages change seldom, the code often: copied in this order, new code does not install them again.
WORKDIR /kvlab
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY scripts/setup.sh scripts/
COPY kvlab/__init__.py kvlab/
RUN PIP_NO_CACHE_DIR=1 sh scripts/setup.sh
COPY --chown=1000:1000 . .

ENV PATH=/kvlab/.venv/bin:$PATH
USER 1000:1000
EXPOSE 8888

# 0.0.0.0 is the container's own network; docker-compose.yml publishes the port on this machine alone.
# JUPYTER_TOKEN is the token; where it is empty or not set, Jupyter makes a random one and prints the link.
CMD ["sh", "-c", "sh scripts/setup.sh --copy ~/work && exec jupyter lab --ip=0.0.0.0 --no-browser --notebook-dir=$HOME/work --LabApp.default_url=/lab/tree/00_start_here.ipynb"]
