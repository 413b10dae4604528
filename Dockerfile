# The agent with the tools that its backends drive. Build: docker build --tag metaleg-agent .
FROM docker.io/library/rust:1-slim-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock rust-toolchain.toml ./
COPY src src
# The lab and the end-to-end tests are members of the workspace, and no part of the image.
RUN sed -i 's/^members = .*/members = ["."]/' Cargo.toml \
 && echo '# MetalEG' > README.md \
 && cargo build --release --package metaleg \
 && mv target/release/metaleg-agent /metaleg-agent

# Debian's iptables 1.8.9 and ipset 7.17: no newer than what nodes have, because a newer tool can create objects
# that the node's own older one cannot read.
FROM docker.io/library/debian:bookworm-slim
RUN apt-get update \
 && apt-get install --yes --no-install-recommends iptables ipset \
 && rm -rf /var/lib/apt/lists/* /var/cache/debconf /usr/share/doc /usr/share/man
COPY --from=build /metaleg-agent /usr/local/bin/metaleg-agent
ENTRYPOINT ["/usr/local/bin/metaleg-agent"]
