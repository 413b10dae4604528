# The agent with the tools that its backends drive. Build: docker build --tag metaleg-agent .
FROM docker.io/library/rust:1-slim-bookworm AS build
WORKDIR /src
# Not rust-toolchain.toml: the image's own toolchain is the one to use.
COPY Cargo.toml Cargo.lock ./
COPY src src
# A member of the workspace, which cargo wants to know of; nothing of it is built.
COPY lab/Cargo.toml lab/Cargo.toml
RUN cargo build --locked --release --package metaleg

# Debian's iptables 1.8.9, ipset 7.17 and nft 1.0.6: no newer than what nodes have, because a newer tool can create objects
# that the node's own older one cannot read.
FROM docker.io/library/debian:bookworm-slim
RUN apt-get update \
 && apt-get install --yes --no-install-recommends iptables ipset nftables \
 && rm -rf /var/lib/apt/lists/* /var/cache/debconf /usr/share/doc /usr/share/man
COPY --from=build /src/target/release/metaleg-agent /usr/local/bin/metaleg-agent
ENTRYPOINT ["/usr/local/bin/metaleg-agent"]
