# The image of the agent: one static program. `cargo xtask image` makes the same without a daemon.
#
#   docker build --tag registry.example/egress-agent:0.1.0 .
#
# Built from Debian's packages; the dependencies come from where cargo is configured to get them.
FROM debian:bookworm AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      binutils ca-certificates cargo-web gcc git libc6-dev libstd-rust-web-dev libstd-rust-web-dev-bpf \
      libpolly-22-dev libzstd-dev llvm-22-dev rustc-web zlib1g-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo xtask image --program-only /egress-agent

# No shell, no library, no package to be kept up to date. The agent trusts the certificate that the
# cluster gives it, and no authority.
FROM scratch
LABEL org.opencontainers.image.title="egress-agent" \
      org.opencontainers.image.description="Enforces, per pod, which DNS names, addresses and ports it may reach" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
COPY --from=build /egress-agent /usr/local/bin/egress-agent
ENV PATH=/usr/local/bin
# No USER: pins, the socket and other processes' namespaces belong to root. What the agent may do is
# limited by its capabilities (manifests/base/daemonset.yaml).
ENTRYPOINT ["/usr/local/bin/egress-agent"]
CMD ["--help"]
