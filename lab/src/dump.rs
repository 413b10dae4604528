//! What helps to understand a failure.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::Lab;

impl Lab {
    /// Writes everything that helps to understand a failure into a directory.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn dump(&self, target: &Path) -> Result<()> {
        fs::create_dir_all(target)?;
        for node in self.nodes.iter() {
            let text = node.output(
                "for c in 'ip rule' 'ip -6 rule' 'ip route show table all' 'ip -6 route show table all' \
                 'ip neigh' iptables-nft-save ip6tables-nft-save iptables-legacy-save ip6tables-legacy-save \
                 'nft list ruleset' 'ipset save' 'conntrack -L' 'conntrack -L -f ipv6'; do \
                 echo \"== $c\"; $c 2>&1 || true; done",
            )?;
            fs::write(target.join(format!("{}.txt", node.name)), text.stdout)?;
        }
        let objects = self.kubectl(&[
            "get",
            "services,endpointslices,nodes,pods,servicel2statuses.metallb.io",
            "-A",
            "-o",
            "yaml",
        ]);
        fs::write(
            target.join("objects.yaml"),
            objects.unwrap_or_else(|error| format!("{error:#}")),
        )?;
        for entry in fs::read_dir(self.directory().join("logs"))? {
            let entry = entry?;
            fs::copy(entry.path(), target.join(entry.file_name()))?;
        }
        Ok(())
    }

    pub(crate) fn log(&self, program: &str) -> String {
        let path = self.directory().join(format!("logs/{program}.log"));
        fs::read_to_string(path).unwrap_or_default()
    }
}
