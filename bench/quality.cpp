// SPDX-License-Identifier: Apache-2.0
/// Where training ends under each setting, against plain fp32 AdamW: validation loss after 1,000
/// steps, paired by seed (same start, same data).
///   quality --task text --settings adamw8,balanced --json out.json
///   quality --steps 100 --seeds 1 --sanity            what CI runs, all settings, both tasks
/// Learning rates rise for the first twentieth of the steps to 1e-3 and fall as a cosine to a tenth.
#include "quality/settings.hpp"
#include "quality/tasks.hpp"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>

namespace {

using Json = nlohmann::ordered_json;
using quality::Setting, quality::Task;

struct Options {
  std::string data = FOURFOLD_DEFAULT_CORPUS, json, baseline;
  std::vector<std::string> tasks{"text", "images"}, settings;
  std::int64_t steps = 1000, seeds = 3;
  double learning_rate = 1e-3;
  bool sanity = false, list = false;
};

double learning_rate(const Options& options, std::int64_t step) {
  const double warm_up = std::max(1.0, options.steps / 20.0), done = step + 1.0;
  if (done <= warm_up) return options.learning_rate * done / warm_up;
  const double along = (done - warm_up) / (options.steps - warm_up);
  return options.learning_rate * (0.55 + 0.45 * std::cos(M_PI * along));
}

struct Run {
  double start = 0, training = 0, validation = 0, seconds_a_step = 0;
};

Run run(const Options& options, Task& task, const Setting& setting, std::int64_t seed) {
  torch::manual_seed(static_cast<std::uint64_t>(seed));
  task.restart(static_cast<std::uint64_t>(seed));
  const auto model = task.model();
  Run result{.start = task.validation(*model)};
  const auto trainer = setting.trainer(*model);
  const auto begin = std::chrono::steady_clock::now();
  for (std::int64_t step = 0; step < options.steps; ++step)
    result.training = trainer->step(task.next(*model), learning_rate(options, step));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  result.seconds_a_step = seconds.count() / static_cast<double>(options.steps);
  result.validation = trainer->validation([&] { return task.validation(*model); });
  return result;
}

/// Mean of the paired differences in per cent of the baseline, and its standard error.
struct Difference {
  std::vector<double> each;
  double mean = 0, error = 0;
};

Difference difference(const std::vector<Run>& runs, const std::vector<Run>& baseline) {
  Difference result;
  const auto n = static_cast<double>(runs.size());
  for (std::size_t i = 0; i < runs.size(); ++i) {
    result.each.push_back(100 * (runs[i].validation / baseline[i].validation - 1));
    result.mean += result.each.back() / n;
  }
  double squares = 0;
  for (const double one : result.each) squares += (one - result.mean) * (one - result.mean);
  if (n > 1) result.error = std::sqrt(squares / (n - 1) / n);
  return result;
}

/// What a run of any length must have done, if nothing is broken: learned more than how often each
/// answer comes, and nine tenths of what plain learned.
bool sane(const Run& run, const Run& plain, double frequencies) {
  return std::isfinite(run.validation) && run.validation < frequencies &&
         run.start - run.validation > 0.9 * (plain.start - plain.validation);
}

std::vector<Setting> chosen(const Options& options) {
  const auto all = quality::settings();
  std::vector<Setting> result{all.front()};
  for (const std::string& name : options.settings) {
    const auto found = std::find_if(all.begin(), all.end(),
                                    [&](const Setting& setting) { return setting.name == name; });
    TORCH_CHECK(found != all.end(), "--settings got '", name, "'; --list names those there are");
    if (found != all.begin()) result.push_back(*found);
  }
  if (options.settings.empty()) result.insert(result.end(), all.begin() + 1, all.end());
  return result;
}

/// The first setting's runs of a task from a file of --json, if they were as long and as many.
std::vector<Run> baseline_of(const Options& options, const std::string& task) {
  std::vector<Run> runs;
  if (options.baseline.empty()) return runs;
  std::ifstream in(options.baseline);
  TORCH_CHECK(in, "--baseline ", options.baseline,
              " cannot be read; give a file that --json wrote");
  const Json file = Json::parse(in);
  TORCH_CHECK(
      file.at("steps") == options.steps && file.at("learning_rate") == options.learning_rate,
      "--baseline ", options.baseline, " holds runs of ", file.at("steps").dump(), " steps at ",
      file.at("learning_rate").dump(), ", and these have ", options.steps, " at ",
      options.learning_rate, "; give the same --steps and --learning-rate");
  for (const Json& one : file.at("tasks"))
    if (one.at("task") == task)
      for (const Json& seed : one.at("settings").at(0).at("seeds"))
        runs.push_back({.start = seed.at("first_validation_loss"),
                        .training = seed.at("training_loss"),
                        .validation = seed.at("validation_loss"),
                        .seconds_a_step = seed.at("seconds_a_step")});
  TORCH_CHECK(runs.size() >= static_cast<std::size_t>(options.seeds), "--baseline ",
              options.baseline, " holds ", runs.size(), " runs of the task ", task, ", and ",
              options.seeds, " were asked for; give fewer --seeds, or another file");
  runs.resize(static_cast<std::size_t>(options.seeds));
  return runs;
}

Json measure(const Options& options, const std::string& name, Task& task, bool& all_sane) {
  Json results = Json::array();
  std::vector<Run> baseline = baseline_of(options, name);
  const std::size_t known = baseline.size();
  const double frequencies = task.loss_of_frequencies();
  std::printf("\n%s: %ld steps, %ld seeds; loss of frequencies alone %.4f\n", name.c_str(),
              static_cast<long>(options.steps), static_cast<long>(options.seeds), frequencies);
  std::printf("%-20s %9s %8s %9s %8s %8s  %s\n", "setting", "loss", "to plain", "std error",
              "limit", "ms/step", "paired differences in %");
  const std::vector<Setting> settings = chosen(options);
  for (const Setting& setting : settings) {
    std::vector<Run> runs;
    double loss = 0, seconds = 0;
    for (std::int64_t seed = 0; seed < options.seeds; ++seed) {
      if (known > 0 && &setting == &settings.front())
        runs.push_back(baseline[static_cast<std::size_t>(seed)]);
      else
        runs.push_back(run(options, task, setting, seed));
      loss += runs.back().validation / static_cast<double>(options.seeds);
      seconds += runs.back().seconds_a_step / static_cast<double>(options.seeds);
      if (baseline.size() < runs.size()) baseline.push_back(runs.back());
      const bool good = sane(runs.back(), baseline[runs.size() - 1], frequencies);
      if (options.sanity && !good)
        std::printf("%s, seed %ld: validation loss %.4f from %.4f is not sane\n", setting.name,
                    static_cast<long>(seed), runs.back().validation, runs.back().start);
      all_sane = all_sane && good;
    }
    const Difference to_plain = difference(runs, baseline);
    char limit[16] = "-";
    if (setting.limit) std::snprintf(limit, sizeof limit, "%.2f%%", *setting.limit);
    std::printf("%-20s %9.4f %+7.3f%% %8.3f%% %8s %8.1f ", setting.name, loss, to_plain.mean,
                to_plain.error, limit, seconds * 1e3);
    for (const double one : to_plain.each) std::printf(" %+.3f", one);
    std::printf("\n");
    std::fflush(stdout);
    Json seeds = Json::array();
    for (std::size_t i = 0; i < runs.size(); ++i)
      seeds.push_back({{"seed", i},
                       {"first_validation_loss", runs[i].start},
                       {"training_loss", runs[i].training},
                       {"validation_loss", runs[i].validation},
                       {"difference_percent", to_plain.each[i]},
                       {"seconds_a_step", runs[i].seconds_a_step}});
    results.push_back({{"setting", setting.name},
                       {"about", setting.about},
                       {"validation_loss", loss},
                       {"mean_difference_percent", to_plain.mean},
                       {"standard_error_percent", to_plain.error},
                       {"limit_percent", setting.limit ? Json(*setting.limit) : Json()},
                       {"seeds", seeds}});
  }
  return {{"task", name}, {"loss_of_frequencies", frequencies}, {"settings", results}};
}

int quality_main(int argc, char** argv) {
  Options options;
  CLI::App app{"Validation loss of compressed training against plain, paired by seed"};
  app.add_option("--task", options.tasks, "text, images")->delimiter(',');
  app.add_option("--settings", options.settings, "which, by name; all without it")->delimiter(',');
  app.add_option("--steps", options.steps)->check(CLI::PositiveNumber);
  app.add_option("--seeds", options.seeds)->check(CLI::PositiveNumber);
  app.add_option("--learning-rate", options.learning_rate)->check(CLI::PositiveNumber);
  app.add_option("--data", options.data, "a text file, or a folder whose headers are the text");
  app.add_option("--json", options.json, "where to write the figures");
  app.add_option("--baseline", options.baseline, "a file of --json: the first setting is not run");
  app.add_flag("--sanity", options.sanity, "fail if a run has not learned what any run should");
  app.add_flag("--list", options.list, "name the settings");
  CLI11_PARSE(app, argc, argv);
  if (options.list) {
    for (const Setting& setting : quality::settings())
      std::printf("%-20s %s\n", setting.name, setting.about);
    return 0;
  }
  bool all_sane = true;
  Json tasks = Json::array();
  for (const std::string& name : options.tasks) {
    TORCH_CHECK(name == "text" || name == "images", "--task got '", name,
                "'; it takes text and images");
    std::unique_ptr<Task> task;
    if (name == "text") task = std::make_unique<quality::Text>(options.data);
    if (name == "images") task = std::make_unique<quality::Images>();
    tasks.push_back(measure(options, name, *task, all_sane));
  }
  if (!options.json.empty()) {
    std::ofstream out(options.json);
    TORCH_CHECK(out, "--json ", options.json,
                " cannot be written; give a file in a folder that exists");
    out << Json{{"steps", options.steps},
                {"seeds", options.seeds},
                {"learning_rate", options.learning_rate},
                {"threads", torch::get_num_threads()},
                {"tasks", tasks}}
               .dump(2)
        << '\n';
  }
  return options.sanity && !all_sane ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return quality_main(argc, argv);
  } catch (const c10::Error& error) {
    std::cerr << "quality: " << error.what_without_backtrace() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "quality: " << error.what() << '\n';
  }
  return 1;
}
