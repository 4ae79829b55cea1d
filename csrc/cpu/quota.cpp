#include "quota.h"

#include <climits>
#include <fstream>

namespace fused_rnn::cpu {
namespace {

// Of a group's folder; INT_MAX where there is no such file, or no limit in it ("max", or -1).
int quota_in(const std::string& folder) {
  double quota = 0, period = 0;
  if (std::ifstream file(folder + "/cpu.max"); !(file >> quota >> period)) {
    std::ifstream v1_quota(folder + "/cpu.cfs_quota_us"), v1_period(folder + "/cpu.cfs_period_us");
    if (!(v1_quota >> quota) || !(v1_period >> period)) return INT_MAX;
  }
  if (quota <= 0 || period <= 0 || quota / period >= 1e6) return INT_MAX;
  const int whole = int(quota / period);
  return whole < quota / period ? whole + 1 : whole;
}

// The least of a group and of those it lies in. Inside a container the mount may begin at the container's own group, whatever its name is.
int least(const std::string& mount, std::string group) {
  for (int found = INT_MAX;;) {
    const int here = quota_in(mount + group);
    if (here < found) found = here;
    if (group.empty()) return found;
    const size_t slash = group.rfind('/');
    group.resize(slash == std::string::npos ? 0 : slash);
  }
}

}  // namespace

int quota(const std::string& root) {
  const std::string mounts = root + "/sys/fs/cgroup";
  int found = INT_MAX;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/group", or of version 1 "4:cpu,cpuacct:/group"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), group = line.substr(second + 1);
    for (const std::string& name : {controllers, std::string("cpu")}) {
      if (!controllers.empty() && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
      const int here = least(controllers.empty() ? mounts : mounts + "/" + name, group == "/" ? "" : group);
      if (here < found) found = here;
    }
  }
  return found;
}

}  // namespace fused_rnn::cpu
