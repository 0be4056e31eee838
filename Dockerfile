FROM python:3.11-slim

# Empty takes pip's default index; give the CPU or a CUDA index to choose torch's build.
ARG TORCH_INDEX=

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" ${TORCH_INDEX:+--index-url $TORCH_INDEX}

COPY engine engine
COPY services services
COPY worker worker
COPY migrations migrations
COPY examples examples
COPY web web
# Editable: templates and static files are found beside the code. The compiler stays in the image: the engine's CPU path
# is built at its first start, for the processor it then finds.
RUN pip install --no-cache-dir -c constraints.txt -e '.[compiler]' \
    && useradd --system --create-home --home-dir /var/lib/whet whet \
    && install -d -o whet -g whet -m 0700 /var/lib/whet/home /run/whet

USER whet
ENV WHET_HOME=/var/lib/whet/home WHET_RUN_DIR=/run/whet PYTHONUNBUFFERED=1
ENTRYPOINT ["whet"]
